-- What operators' verbs stand on: indexes for every listing, an audit log nobody can rewrite, paused handlers.

-- Listings -------------------------------------------------------------------------------------
-- No index on outbox or processed_events: every writer and every consumer would pay for it.

-- Deliveries of one state in writing order, and how many there are.
create index deliveries_listing_idx on dovecote.deliveries (handler_name, state, position);
-- Failures of one kind: how many, the first and the last.
create index deliveries_group_idx on dovecote.deliveries (state, handler_name, error_fingerprint, updated_at);
drop index dovecote.deliveries_state_idx;

-- How much was published lately.
create index published_batches_moment_idx on dovecote.published_batches (published_at);

create function dovecote.processed_lately(seconds integer, pages integer default 128)
returns table (handler_name text, events_per_second float8)
language plpgsql stable security definer set search_path = pg_catalog, dovecote as $$
-- How fast each handler acts. New rows lie at the end of a partition's file, however old their event is: the last
-- pages tell it, without an index on the moment and without a look at the rest. Definer's rights because nobody
-- else may read a partition by its name.
declare
    part record;
begin
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

revoke all on function dovecote.processed_lately from public;
grant execute on function dovecote.processed_lately to dovecote_worker, dovecote_operator;

-- Audit ----------------------------------------------------------------------------------------

alter table dovecote.audit_log add column login text not null default session_user;
alter table dovecote.audit_log add column affected bigint;

comment on table dovecote.audit_log is 'What operators did. Added to only: nobody but the owner may change or remove a row.';
comment on column dovecote.audit_log.actor is 'The name the operator gave.';
comment on column dovecote.audit_log.login is 'The database login, which is what was authenticated.';

-- Not the moment, not the login, not the id: those are the database's own word.
revoke insert on dovecote.audit_log from dovecote_worker, dovecote_operator;
grant insert (actor, action, reason, affected, details) on dovecote.audit_log to dovecote_worker, dovecote_operator;

-- Paused handlers ------------------------------------------------------------------------------

create table dovecote.paused_handlers (
    handler_name text        not null,
    state        text        not null default 'paused',
    sent_up_to   bigint      not null,
    paused_by    text        not null,
    reason       text        not null,
    paused_at    timestamptz not null default clock_timestamp(),
    constraint paused_handlers_pkey primary key (handler_name),
    constraint paused_handlers_state_is_known check (state in ('paused', 'resuming'))
);

comment on table dovecote.paused_handlers is 'One row for each handler that is paused or catching up; none for one at work.';
comment on column dovecote.paused_handlers.sent_up_to is
    'Of what lies at or below this position nothing is left out; what lies above is sent once the handler resumes.';

grant select on dovecote.paused_handlers to dovecote_worker, dovecote_operator;
grant insert, update on dovecote.paused_handlers to dovecote_operator;
grant update, delete on dovecote.paused_handlers to dovecote_worker;
