-- The progress of each handler: its low-water mark, and what is open above it.
--
-- A row says one thing, and it is true in every snapshot that sees the row: an event that the handler wants, at or below
-- `examined` and not in `open`, is recorded. Recorded is what the handler has processed, and what is in `deliveries`
-- in any state. Nothing recorded ever becomes outstanding again: rows leave `deliveries` only together with a row in
-- `processed_events`, or with their week.
--
-- `open` is a superset. What is in it may be recorded by now, or no event at all. So removing something too late is never
-- wrong, and no crash, lost tick or second relay can make a row false.

create table dovecote.progress (
    handler_name text           not null,
    examined     bigint         not null,
    open         int8multirange not null default '{}',
    low_water_mark bigint       generated always as (coalesce(lower(open) - 1, examined)) stored,
    moved_at     timestamptz    not null default clock_timestamp(),
    constraint progress_pkey primary key (handler_name),
    constraint progress_open_is_examined check (open <@ int8multirange(int8range(null, examined, '(]')))
) with (fillfactor = 10);  -- some small rows, updated once a second: always HOT, on the same page

comment on table dovecote.progress is
    'At or below `low_water_mark` all that a handler wants is recorded: it is processed, or in deliveries.';
comment on column dovecote.progress.examined is
    'What the handler wants at or below this position, and is not in `open`, is recorded.';
comment on column dovecote.progress.open is 'Positions at or below `examined` that may not be recorded yet.';
comment on column dovecote.progress.low_water_mark is 'Below it nothing is open.';

-- Moving low-water marks, adding subscriptions and opening ranges exclude each other: each takes this lock until its
-- transaction ends.
create view dovecote.progress_lock as select 'held while low-water marks are moved or opened' as purpose;

-- What handlers want of types: what is above `since_position` and not in `published_above`. A version without a
-- subscription so far, of an event that the handler wants, counts as wanted since that event: the code that knows it will
-- subscribe to it from there on (dovecote/relay/relay.py, _SUBSCRIBE).
create function dovecote.wanted_since(handlers text[], event_types text[])
returns table (handler_name text, event_type text, since_position bigint, published_above int8multirange)
language sql stable
begin atomic
    select distinct on (s.handler_name, t.name) s.handler_name, t.name, s.since_position, s.published_above
    from pg_catalog.unnest(event_types) as t (name)
    join dovecote.subscriptions s
        on s.handler_name = any(handlers) and dovecote.event_name(s.event_type) = dovecote.event_name(t.name)
    order by s.handler_name, t.name, s.event_type <> t.name, s.since_position, s.event_type;
end;

-- The same positions and more, in `max_ranges` ranges: the smallest gaps are closed. They are examined
-- again when the low-water mark arrives there.
create function dovecote.coarser(ranges int8multirange, max_ranges integer) returns int8multirange
language sql immutable parallel safe
begin atomic
    with part as (
        select lower(r) as low, upper(r) as high, lead(lower(r)) over (order by lower(r)) as next
        from pg_catalog.unnest(ranges) r
    ), gap as (
        select int8range(high, next) as positions from part
        where next is not null order by next - high desc limit max_ranges - 1
    )
    select case when (select count(*) from part) <= max_ranges then ranges
                else int8multirange(int8range((select min(low) from part), (select max(high) from part)))
                     - coalesce((select range_agg(positions) from gap), '{}') end;
end;

-- The first `max_events` events in these ranges, in writing order, and of those the ones `of_types`. `upto` is how far
-- that is: the position of the last one read when there are `max_events`, else the end of the ranges.
create function dovecote.events_in(
    ranges int8multirange, max_events integer, of_types text[] default null,
    out positions bigint[], out ids uuid[], out types text[], out events_read integer, out upto bigint
)
-- Volatile: its statements take their snapshots after their locks. Rows that dovecote.place_misplaced_rows moves would be seen
-- in neither place by a snapshot from before.
language plpgsql volatile
set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_bitmapscan = off
set enable_indexscan = on set enable_seqscan = off set enable_sort = off set jit = off as $$
declare
    part int8range;
    more record;
begin
    positions := '{}'; ids := '{}'; types := '{}'; events_read := 0;
    for part in select r from unnest(ranges) r order by lower(r) loop
        select count(*) as events_read, max(f.position) as upto,
               array_agg(f.position) filter (where of_types is null or f.event_type = any(of_types)) as positions,
               array_agg(f.id) filter (where of_types is null or f.event_type = any(of_types)) as ids,
               array_agg(f.event_type) filter (where of_types is null or f.event_type = any(of_types)) as types
        into more
        from (select o.position, o.id, o.event_type from dovecote.outbox o
              where o.position >= lower(part) and o.position < coalesce(upper(part), 9223372036854775807)
              order by o.position limit max_events - events_in.events_read) f;
        positions := positions || more.positions; ids := ids || more.ids; types := types || more.types;
        events_read := events_read + more.events_read;
        upto := more.upto;
        exit when events_read >= max_events;
        upto := coalesce(upper(part) - 1, upto, lower(part) - 1);
    end loop;
end $$;

-- Which of these events are outstanding: one row for each handler that wants any of it. `events` counts them, `ranges`
-- covers them, and nothing recorded that the handler wants. What it does not want may lie inside, or a handler that wants
-- every fourth event would have a range for each.
create function dovecote.outstanding_of(handlers text[], positions bigint[], ids uuid[], types text[])
returns table (handler_name text, events bigint, ranges int8multirange)
language plpgsql volatile
-- The planner takes `= any` of an array for ten rows and would compare everything with everything: 1.8 s instead of
-- 20 ms for 5,000 events. Hash joins, whatever the statistics say.
set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_bitmapscan = off
set enable_hashjoin = on set enable_indexscan = on set enable_mergejoin = off set enable_nestloop = off
set enable_seqscan = off set jit = off as $$
#variable_conflict use_column
begin
    return query
    with fresh as materialized (
        select * from unnest(positions, ids, types) as f (position, id, event_type)
    ), wanted as materialized (
        select * from dovecote.wanted_since(handlers, array(select distinct event_type from fresh))
    ), wants as materialized (
        select w.handler_name, f.position, f.id
        from fresh f join wanted w on w.event_type = f.event_type
        where f.position > w.since_position
          and (isempty(w.published_above) or not w.published_above @> f.position)
    ), done as materialized (
        -- One walk through the leaves of the key for all handlers: sorted ids skip what is between them. Ids from
        -- clocks that are off cost a descent each. The bounds prune weeks.
        select p.event_id, p.handler_name from dovecote.processed_events p
        where p.event_id = any(array(select id from fresh order by id))
          and p.event_id >= (select id from fresh order by id limit 1)
          and p.event_id <= (select id from fresh order by id desc limit 1)
    ), undone as materialized (
        select w.* from wants w
        where not exists (select from done p where p.event_id = w.id and p.handler_name = w.handler_name)
    ), outstanding as materialized (
        select w.handler_name, w.position
        from undone w
        left join lateral (select true as is_kept from dovecote.deliveries d
                           where d.handler_name = w.handler_name and d.event_id = w.id limit 1) d on true
        where d.is_kept is null
    ), counted as materialized (
        select u.handler_name, count(*) as events from outstanding u group by 1
    ), few as (  -- the usual case: what is under way right now
        select u.handler_name, range_agg(int8range(u.position, u.position, '[]')) as ranges
        from outstanding u join counted c on c.handler_name = u.handler_name and c.events <= 64 group by 1
    ), runs as (  -- a backlog: neighbours among the wanted ones make one range
        select r.handler_name, int8range(min(r.position), max(r.position), '[]') as range
        from (
            select w.handler_name, w.position, u.position is not null as is_outstanding,
                   row_number() over (partition by w.handler_name order by w.position)
                   - row_number() over (partition by w.handler_name, u.position is not null order by w.position) as run
            from counted c
            join wants w on w.handler_name = c.handler_name
            left join outstanding u on u.handler_name = w.handler_name and u.position = w.position
            where c.events > 64
        ) r
        where r.is_outstanding group by r.handler_name, r.run
    )
    select c.handler_name, c.events,
           coalesce((select f.ranges from few f where f.handler_name = c.handler_name),
                    (select range_agg(r.range) from runs r where r.handler_name = c.handler_name))
    from counted c;
end $$;

-- Positions above the checkpoint that are not among those that were found: their writers may commit later.
create function dovecote.absent(looked int8multirange, checkpoint bigint, positions bigint[]) returns int8multirange
language sql immutable parallel safe
begin atomic
    select looked * int8multirange(int8range(checkpoint, null, '()'))
           - coalesce((select range_agg(int8range(x, x, '[]')) from pg_catalog.unnest(positions) x where x > checkpoint), '{}');
end;

-- Examine again what one handler has open from a position on: 64 events, and four times as many as long as all
-- of them are found recorded. The caller has the lock.
create function dovecote.examine_again(
    handler text, begins bigint, checkpoint bigint, max_events integer, max_ranges integer,
    out events_read integer, out outstanding bigint, out has_moved boolean
)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    batch  integer := least(64, max_events);
    ranges int8multirange;
    look   record;
    looked int8multirange;
    stays  int8multirange;
begin
    events_read := 0; outstanding := 0; has_moved := false;
    loop
        select p.open * int8multirange(int8range(begins, null)) into ranges
        from dovecote.progress p where p.handler_name = handler;
        exit when ranges is null or isempty(ranges);
        select * into look from dovecote.events_in(ranges, batch);
        looked := int8multirange(int8range(null, look.upto, '(]')) * ranges;
        select coalesce(sum(u.events), 0), coalesce(range_agg(u.ranges), '{}') into outstanding, stays
        from dovecote.outstanding_of(array[handler], look.positions, look.ids, look.types) u;
        -- A range may reach over what was known to be recorded between two open ones: that is cut out again.
        stays := (dovecote.absent(looked, checkpoint, look.positions) + stays) * ranges;
        if stays <> looked then
            has_moved := true;
            update dovecote.progress p
            set open = dovecote.coarser(p.open - looked + stays, max_ranges), moved_at = clock_timestamp()
            where p.handler_name = handler;
        end if;
        events_read := events_read + look.events_read;
        exit when outstanding > 0 or look.events_read < batch or events_read >= max_events;
        batch := least(batch * 4, max_events - events_read);
        begins := look.upto + 1;
    end loop;
end $$;

-- One step of the low-water marks: examine what is above them, at most `max_events` events for all handlers that are at
-- the same position, and the head of what a handler has had open for long.
--
--     events_read  how many were examined
--     outstanding  how many of those are outstanding, for all handlers
--     has_moved    whether any row has changed
--     is_behind    whether another step now would move them further
--     is_open      whether anything is open or not examined yet
--
-- READ COMMITTED only, a transaction of its own. Correctness depends on the order of reads: first the checkpoint (a
-- position missing at or below it never appears), then the outbox, then what is recorded. Each snapshot sees all that the one
-- before it saw, and what is recorded stays recorded.
create function dovecote.move_low_water_marks(
    leading_epoch bigint, published_upto bigint, max_events integer default 5000, max_ranges integer default 100,
    out events_read integer, out outstanding bigint, out has_moved boolean, out is_behind boolean, out is_open boolean
)
language plpgsql volatile set search_path = pg_catalog, pg_temp set jit = off as $$
declare
    at_checkpoint bigint;
    to_examine    bigint;
    front         bigint;
    part          record;
    look          record;
    upto          bigint;
    looked        int8multirange;
    not_there     int8multirange;
    here          bigint;
    moved         bigint;
begin
    events_read := 0; outstanding := 0; has_moved := false; is_behind := false; is_open := true;
    -- A relay that was replaced moves nothing: a later leader that subscribes to more takes the lock too, and has raised the epoch.
    if not dovecote.try_lock('progress_lock') then
        return;
    end if;
    select s.checkpoint into at_checkpoint from dovecote.relay_state s where s.epoch = leading_epoch;
    if not found then
        return;
    end if;
    -- Never above what is published: a new event is wanted from the next leader's checkpoint on.
    to_examine := greatest(published_upto, at_checkpoint);
    select max(p.examined) into front from dovecote.progress p;

    -- Forward, for all together from the lowest low-water mark near the front. Those that are further behind are read
    -- separately. A position that has been open for long is no place to begin: the same events would be read every time.
    for part in
        select array_agg(p.handler_name) as names, min(p.begins) as begins
        from (select q.handler_name, case when q.examined - q.low_water_mark <= max_events / 2 then q.low_water_mark else q.examined end as begins
              from dovecote.progress q) p
        group by case when front - p.begins <= 2 * max_events then -1 else p.begins end
        order by 2 desc
    loop
        continue when part.begins >= to_examine;
        select * into look from dovecote.events_in(int8multirange(int8range(part.begins, to_examine, '(]')), max_events);
        upto := coalesce(look.positions[cardinality(look.positions)], part.begins);
        -- What is left of a dropped week, or numbers that were never used: go on to the checkpoint.
        if cardinality(look.positions) < max_events then
            upto := greatest(upto, at_checkpoint);
        else
            is_behind := true;
        end if;
        looked := int8multirange(int8range(part.begins, upto, '(]'));
        not_there := dovecote.absent(looked, at_checkpoint, look.positions);
        with outstanding_here as materialized (
            select * from dovecote.outstanding_of(part.names, look.positions, look.ids, look.types)
        ), after as materialized (
            select p.handler_name, greatest(p.examined, upto) as examined,
                   dovecote.coarser(p.open - looked + not_there + coalesce(u.ranges, '{}'), max_ranges) as open
            from dovecote.progress p left join outstanding_here u on u.handler_name = p.handler_name
            where p.handler_name = any(part.names)
        ), changed as (
            update dovecote.progress p
            set examined = a.examined, open = a.open, moved_at = clock_timestamp()
            from after a
            where p.handler_name = a.handler_name and (p.examined <> a.examined or p.open <> a.open)
            returning 1
        )
        select coalesce((select sum(u.events) from outstanding_here u), 0), (select count(*) from changed) into here, moved;
        events_read := events_read + cardinality(look.positions);
        outstanding := outstanding + here;
        has_moved := has_moved or moved > 0;
    end loop;

    -- What has been open for long: a backlog, or one event that takes its time. A backlog is acted on in order, so its
    -- head is where rows change. A second read at a random place finds what was done behind a head that does not move.
    for part in
        select p.handler_name as name, lower(p.open) as low, upper(p.open) as high from dovecote.progress p
        where p.examined - p.low_water_mark > max_events / 2 order by p.handler_name
    loop
        select * into look from dovecote.examine_again(part.name, part.low, at_checkpoint, max_events, max_ranges);
        events_read := events_read + look.events_read;
        outstanding := outstanding + look.outstanding;
        has_moved := has_moved or look.has_moved;
        is_behind := is_behind or (look.outstanding = 0 and look.events_read >= max_events);
        if look.outstanding > 0 then
            select * into look from dovecote.examine_again(
                part.name, part.low + floor(random() * (part.high - part.low))::bigint, at_checkpoint, max_events, max_ranges);
            events_read := events_read + look.events_read;
            has_moved := has_moved or look.has_moved;
        end if;
    end loop;

    select coalesce(bool_or(not isempty(p.open) or p.examined < to_examine), false) into is_open from dovecote.progress p;
end $$;

-- How many events a handler wants and has outstanding, and when the first of them in writing order was written. It
-- reads what is open and what is not examined yet; `of_types`: of these types only.
--
-- `at_least`: there may be more. It stops at `bound` events, and after reading some times as many; a handler that has no
-- row, or whose history is not examined yet, is not said to have nothing before it.
create function dovecote.unprocessed(
    handler text, bound integer, of_types text[] default null,
    out events bigint, out oldest timestamptz, out at_least boolean
)
language plpgsql volatile set search_path = pg_catalog, pg_temp set jit = off as $$
declare
    step   constant integer := least(5000, bound);
    -- To read an event costs a fifth of what it costs to find out whether it is recorded.
    unread bigint := bound::bigint * 10;
    ranges int8multirange;
    look   record;
    here   record;
begin
    events := 0; at_least := false;
    select p.open + int8multirange(int8range(p.examined, null, '()')) into ranges
    from dovecote.progress p where p.handler_name = handler;
    if not found then
        at_least := true;
        return;
    end if;
    loop
        select * into look from dovecote.events_in(ranges, step, of_types);
        select coalesce(sum(u.events), 0) as events, min(lower(u.ranges)) as first into here
        from dovecote.outstanding_of(array[handler], look.positions, look.ids, look.types) u;
        events := events + here.events;
        if oldest is null and here.first is not null then
            select o.created_at into oldest from dovecote.outbox o where o.position = here.first;
        end if;
        exit when look.events_read < step;
        ranges := ranges * int8multirange(int8range(look.upto, null, '()'));
        unread := unread - step - 4 * cardinality(look.positions);
        if events >= bound or unread <= 0 then
            at_least := true;
            return;
        end if;
    end loop;
end $$;

-- What handlers begin to want below `examined` is open, also where an older relay writes the subscription.
create function dovecote.open_progress(handler text, since_position bigint, published_above int8multirange) returns void
language sql volatile
begin atomic
    update dovecote.progress p
    set open = p.open + (int8multirange(int8range(open_progress.since_position, p.examined, '(]')) - open_progress.published_above),
        moved_at = pg_catalog.clock_timestamp()
    where p.handler_name = handler and p.examined > open_progress.since_position;
end;

create function dovecote.begin_progress() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
-- A new version of a wanted event was counted as wanted before (dovecote.wanted_since): it opens nothing.
begin
    lock table dovecote.progress_lock in share update exclusive mode;
    insert into dovecote.progress (handler_name, examined)
    select a.handler_name, least(min(a.since_position), (select s.checkpoint from dovecote.relay_state s))
    from added a group by a.handler_name
    on conflict (handler_name) do nothing;
    perform dovecote.open_progress(a.handler_name, a.since_position, a.published_above)
    from added a
    left join lateral (
        select s.since_position, s.published_above from dovecote.subscriptions s
        where s.handler_name = a.handler_name and dovecote.event_name(s.event_type) = dovecote.event_name(a.event_type)
          and (s.handler_name, s.event_type) not in (select b.handler_name, b.event_type from added b)
        order by s.since_position, s.event_type limit 1
    ) before on true
    where before.since_position is null
       or before.since_position > a.since_position
       or not before.published_above <@ a.published_above;
    return null;
end $$;

create function dovecote.widen_progress() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    lock table dovecote.progress_lock in share update exclusive mode;
    perform dovecote.open_progress(new.handler_name, new.since_position, new.published_above);
    return null;
end $$;

create trigger begin_progress after insert on dovecote.subscriptions
    referencing new table as added for each statement execute function dovecote.begin_progress();

create trigger widen_progress after update on dovecote.subscriptions
    for each row
    when (new.since_position < old.since_position or not new.published_above @> old.published_above)
    execute function dovecote.widen_progress();

-- Examine everything again: called when events may have appeared below the low-water marks, such as after a restore.
create function dovecote.reopen_progress() returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    reopened bigint;
begin
    lock table dovecote.progress_lock in share update exclusive mode;
    update dovecote.progress p
    set open = int8multirange(int8range(wanted.since, greatest(p.examined, wanted.since), '(]')), moved_at = clock_timestamp()
    from (select s.handler_name, min(s.since_position) as since from dovecote.subscriptions s group by 1) wanted
    where p.handler_name = wanted.handler_name;
    get diagnostics reopened = row_count;
    return reopened;
end $$;

comment on function dovecote.reopen_progress is
    'Make the leading relay examine again everything that handlers want; return for how many handlers.';

-- Up to where nothing blocks a handler: its low-water mark, or 0 while something at or below it has failed and is
-- neither processed nor discarded.
create function dovecote.unblocked_up_to(handler text) returns bigint
language sql stable
begin atomic
    select coalesce((
        select p.low_water_mark from dovecote.progress p
        where p.handler_name = handler
          and not exists (select from dovecote.deliveries d
                          where d.handler_name = handler and d.state = 'dead' and d.position <= p.low_water_mark)
          and not exists (select from dovecote.deliveries d
                          where d.handler_name = handler and d.state = 'retrying' and d.position <= p.low_water_mark)
          and not exists (select from dovecote.deliveries d
                          where d.handler_name = handler and d.state = 'waiting' and d.position <= p.low_water_mark)), 0);
end;

-- Rights ---------------------------------------------------------------------------------------

grant select on dovecote.progress to dovecote_operator, dovecote_viewer;
grant select, insert, update on dovecote.progress to dovecote_worker;
grant update on dovecote.progress_lock to dovecote_worker;
grant execute on function
    dovecote.wanted_since, dovecote.coarser, dovecote.events_in, dovecote.outstanding_of, dovecote.absent,
    dovecote.unprocessed, dovecote.unblocked_up_to
    to dovecote_worker, dovecote_operator, dovecote_viewer;
grant execute on function dovecote.examine_again, dovecote.move_low_water_marks, dovecote.reopen_progress to dovecote_worker;
