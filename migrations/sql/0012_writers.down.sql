-- Back to the functions of 0002.

create or replace function dovecote.uuid_v7() returns uuid
language sql volatile parallel safe as $$
    -- A random v4 uuid whose first 48 bits become the time in milliseconds and whose version becomes 7.
    select encode(
        set_bit(set_bit(
            overlay(uuid_send(gen_random_uuid())
                    placing substring(int8send(floor(extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
                    from 1 for 6),
            52, 1), 53, 1), 'hex')::uuid
$$;

create or replace function dovecote.announce() returns trigger
language plpgsql as $$
-- "Whatever I insert lies above this floor": taken before the first position of the transaction, held
-- until its end. Once a transaction is enough: its first floor is its lowest. A rollback to a savepoint
-- gives back lock and setting together.
-- Every writer pays for this function, so it is made of plain expressions, which plpgsql evaluates
-- without a query.
declare
    this_transaction constant text := pg_current_xact_id()::text;
    announced text;
begin
    if current_setting('dovecote.announced', true) is distinct from this_transaction then
        if not pg_try_advisory_xact_lock_shared(
                dovecote.floor_key(coalesce(pg_sequence_last_value('dovecote.outbox_position'), 0))) then
            raise exception 'somebody holds a floor of the outbox exclusively, which nobody may';
        end if;
        announced := set_config('dovecote.announced', this_transaction, true);
        -- The bell rings only for a relay that sleeps: it then holds this key for itself.
        if not pg_try_advisory_xact_lock_shared(dovecote.bell_key()) then
            perform pg_notify('dovecote_outbox', '');
        end if;
    end if;
    return null;
end $$;

create or replace function dovecote.check_event() returns trigger
language plpgsql as $$
-- What the outbox refuses, in words. One function instead of a constraint for each rule: Postgres prepares
-- every constraint anew for every statement, which cost a writer more than all of its inserts.
declare
    -- 48 bits of Unix milliseconds; meaningful for a UUIDv7 only.
    made_at constant bigint := ('x' || encode(substring(uuid_send(new.id) from 1 for 6), 'hex'))::bit(48)::bigint;
    problem constant text := case
        when get_byte(uuid_send(new.id), 6) >> 4 <> 7
            then format('id %s is not a UUIDv7; leave it out, or make one when the event is written', new.id)
        when abs(made_at - extract(epoch from now()) * 1000) > 86400000
            then format('id %s is of %s, more than a day from now; make it when the event is written',
                        new.id, dovecote.uuid_v7_time(new.id))
        when new.aggregate_type is null or new.aggregate_type !~ '^[a-z][a-z0-9_]{0,62}$'
            then format('aggregate_type %L is not a lower-case word such as ''membership''', new.aggregate_type)
        when new.aggregate_id is null or length(new.aggregate_id) not between 1 and 200
            then format('aggregate_id must have 1 to 200 characters, got %s',
                        coalesce(length(new.aggregate_id)::text, 'null'))
        when new.event_type is null or length(new.event_type) > 200
             or new.event_type !~ '^[a-z][a-z0-9_]*[.][a-z][a-z0-9_]*[.]v[1-9][0-9]*$'
            then format('event_type %L is not <slice>.<fact>.v<n> such as ''billing.payment_recorded.v1''',
                        left(new.event_type, 200))
        when new.payload is null or jsonb_typeof(new.payload) <> 'object'
            then format('payload must be a JSON object, got %s', coalesce(jsonb_typeof(new.payload), 'null'))
        when pg_column_size(new.payload) > 262144
            then format('payload has %s bytes, at most 262144 are taken', pg_column_size(new.payload))
        when new.headers is null or jsonb_typeof(new.headers) <> 'object'
            then format('headers must be a JSON object, got %s', coalesce(jsonb_typeof(new.headers), 'null'))
        when pg_column_size(new.headers) > 16384
            then format('headers have %s bytes, at most 16384 are taken', pg_column_size(new.headers))
    end;
begin
    if problem is not null then
        raise exception 'the outbox refuses the event: %', problem
            using errcode = 'check_violation', schema = 'dovecote', table = 'outbox';
    end if;
    return new;
end $$;

drop function dovecote.refusal(dovecote.outbox);
