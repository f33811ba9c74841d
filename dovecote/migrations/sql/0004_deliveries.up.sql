-- The state of events per handler: subscriptions, processed events, deliveries, paused handlers.

create table dovecote.processed_events (
    event_id     uuid        not null,
    handler_name text        not null,
    processed_at timestamptz not null default clock_timestamp(),
    replay_id    uuid,
    constraint processed_events_pkey primary key (event_id, handler_name)
) partition by range (event_id);

create table dovecote.processed_events_default partition of dovecote.processed_events default;

comment on table dovecote.processed_events is
    'Which handler has acted on which event; written first, in the transaction of the effect.';

-- Deliveries -----------------------------------------------------------------------------------

create table dovecote.deliveries (
    handler_name    text        not null,
    event_id        uuid        not null,
    position        bigint      not null,
    aggregate_type  text        not null,
    aggregate_id    text        not null,
    event_type      text        not null,
    state           text        not null,
    attempts        integer     not null default 0,
    next_attempt_at timestamptz,
    error_type      text,
    headline        text,
    error_fingerprint text,
    error           text,
    trace_id        text,
    first_failed_at timestamptz not null default clock_timestamp(),
    updated_at      timestamptz not null default clock_timestamp(),
    -- A retry is leased while this equals next_attempt_at: another time ends the lease.
    leased_until    timestamptz,
    -- The replay that failed on this event: its retry acts again, once.
    replay_id       uuid,
    first_leased_at timestamptz,
    constraint deliveries_pkey primary key (handler_name, event_id),
    constraint deliveries_state_is_known check (state in ('retrying', 'waiting', 'dead', 'discarded')),
    constraint deliveries_retrying_has_a_time check (state <> 'retrying' or next_attempt_at is not null)
);

comment on table dovecote.deliveries is 'Only what did not go well: retrying, waiting behind another, dead, discarded.';
comment on column dovecote.deliveries.headline is 'Type and message of the error in one line; `error` has the traceback.';
comment on column dovecote.deliveries.leased_until is 'Equals next_attempt_at while the retry is on a queue or in a worker''s hands.';
comment on column dovecote.deliveries.first_leased_at is
    'When this attempt was leased first. What was leased together then is one message, however often it is sent.';

create index deliveries_due_idx on dovecote.deliveries (next_attempt_at) where state = 'retrying';
-- Those of one handler by themselves: others have any number of rows, due or not, and are not looked at.
create index deliveries_due_of_handler_idx on dovecote.deliveries (handler_name, next_attempt_at, position)
    where state = 'retrying';
create index deliveries_aggregate_idx
    on dovecote.deliveries (handler_name, aggregate_type, aggregate_id, position) where state = 'waiting';
create index deliveries_replay_idx
    on dovecote.deliveries (replay_id, aggregate_type, aggregate_id, position) where replay_id is not null;
-- Listings. No index of theirs on outbox or processed_events: every writer and every consumer would pay for it.
-- Deliveries of one state in writing order, and how many there are.
create index deliveries_listing_idx on dovecote.deliveries (handler_name, state, position);
-- Failures of one kind: how many, the first and the last.
create index deliveries_group_idx on dovecote.deliveries (state, handler_name, error_fingerprint, updated_at);

-- Subscriptions --------------------------------------------------------------------------------

-- Since when a handler wants events of a type. Those at or below `since_position` are older: they are
-- none of its business, neither to send again nor to wait for. When the relay first leads with a handler, some events
-- above the checkpoint are published already, and beside them are gaps: positions of writers whose transactions are open.
-- What turns up in a gap is published to the new handler.
create table dovecote.subscriptions (
    handler_name   text        not null,
    event_type     text        not null,
    since_position bigint      not null,
    created_at     timestamptz not null default clock_timestamp(),
    routed_epoch   bigint,
    published_above int8multirange not null default '{}',
    -- What only code knows, recorded by the relay that routes it. Null: by a relay that does not record it.
    replayable     boolean,
    ordered        boolean,
    constraint subscriptions_pkey primary key (handler_name, event_type)
);

comment on column dovecote.subscriptions.routed_epoch is
    'The last leadership of the relay that routed this type to this handler. If it is not the one before, the relays '
    'in between knew less, and the next that knows it sends what they passed over.';
comment on column dovecote.subscriptions.published_above is
    'Positions above since_position that were published before the handler''s time, as those up to it were. What lies '
    'in a gap between them is the handler''s.';
comment on column dovecote.subscriptions.replayable is 'Whether the handler''s route lets it act again on what it has acted on.';
comment on column dovecote.subscriptions.ordered is 'Whether the handler''s route keeps the order of each aggregate.';

create function dovecote.event_name(event_type text) returns text
language sql immutable parallel safe
-- 'billing.payment_recorded' of 'billing.payment_recorded.v2'
return substring(event_type from '^(.*)[.]v[0-9]+$');

-- Paused handlers ------------------------------------------------------------------------------
-- A paused handler's messages are held in Redis, so nothing has to be known of positions.

create table dovecote.paused_handlers (
    handler_name text        not null,
    state        text        not null default 'paused',
    actor        text        not null,
    reason       text        not null,
    paused_at    timestamptz not null default clock_timestamp(),
    constraint paused_handlers_pkey primary key (handler_name),
    constraint paused_handlers_state_is_known check (state in ('paused', 'resuming'))
);

comment on table dovecote.paused_handlers is 'One row for each handler that is paused or catching up; none for a running one.';

-- How fast they act ------------------------------------------------------------------------------

create function dovecote.processed_lately(seconds integer, pages integer default 128)
returns table (handler_name text, events_per_second float8)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
-- How fast each handler acts. New rows lie at the end of a partition's file, however old their event is: the last
-- pages show it, without an index on the time and without reading the rest. Security definer, because only the
-- owner may read a partition by its name.
declare
    part record;
begin
    if seconds is null or seconds not between 1 and 86400 or pages is null or pages not between 1 and 10000 then
        raise exception '1 to 86400 seconds and 1 to 10000 pages are looked at, not % and %',
                        coalesce(seconds::text, 'null'), coalesce(pages::text, 'null')
            using errcode = 'invalid_parameter_value';
    end if;
    for part in
        select inhrelid::regclass as name,
               greatest(0, pg_relation_size(inhrelid) / current_setting('block_size')::bigint - pages) as first_page
        from pg_inherits
        where inhparent = 'dovecote.processed_events'::regclass and pg_relation_size(inhrelid) > 0
    loop
        return query execute format(
            'with tail as materialized (select t.handler_name, t.processed_at from %s t where t.ctid >= %L::tid),
                  seen as (select greatest(clock_timestamp() - make_interval(secs => %s),
                                           case when %s > 0 then min(processed_at) end) as since from tail)
             select tail.handler_name,
                    count(*) / greatest(0.001, extract(epoch from clock_timestamp() - min(seen.since)))::float8
             from tail, seen where tail.processed_at >= seen.since group by 1',
            part.name, format('(%s,0)', part.first_page), seconds, part.first_page);
    end loop;
end $$;

-- Rights ---------------------------------------------------------------------------------------
-- The engine writes what it writes, and no more. Where a delivery belongs is written once.

grant select on dovecote.processed_events, dovecote.deliveries, dovecote.subscriptions
    to dovecote_operator, dovecote_viewer;
grant select, insert on dovecote.processed_events, dovecote.subscriptions to dovecote_worker;
grant update (processed_at, replay_id) on dovecote.processed_events to dovecote_worker;
grant select, delete on dovecote.deliveries to dovecote_worker;
grant insert (handler_name, event_id, position, aggregate_type, aggregate_id, event_type, state, attempts,
              next_attempt_at, error_type, headline, error_fingerprint, error, trace_id, replay_id),
      update (state, attempts, next_attempt_at, error_type, headline, error_fingerprint, error, trace_id, replay_id,
              leased_until, first_leased_at, updated_at)
    on dovecote.deliveries to dovecote_worker;
grant update (routed_epoch, replayable, ordered) on dovecote.subscriptions to dovecote_worker;
grant select on dovecote.paused_handlers to dovecote_worker, dovecote_operator, dovecote_viewer;
grant execute on function dovecote.event_name
    to dovecote_writer, dovecote_service, dovecote_worker, dovecote_operator, dovecote_viewer;
grant execute on function dovecote.processed_lately to dovecote_worker, dovecote_operator, dovecote_viewer;
