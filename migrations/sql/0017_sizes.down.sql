-- Back to the functions of 0012.

drop function dovecote.envelopes(uuid[], bigint);
drop function dovecote.small_envelope(dovecote.outbox);

create or replace function dovecote.check_event() returns trigger
language plpgsql as $$
-- What the outbox takes. Null is not true: what is missing is refused.
begin
    if get_byte(uuid_send(new.id), 6) >> 4 = 7
       -- The first 48 bits of a UUIDv7 are Unix milliseconds; a day is 86,400,000 of them.
       and abs(('x' || encode(substring(uuid_send(new.id) from 1 for 6), 'hex'))::bit(48)::bigint
               - date_part('epoch', now()) * 1000) <= 86400000
       -- A bound inside of the pattern, {0,62}, would take three times as long.
       and new.aggregate_type ~ '^[a-z][a-z0-9_]*$' and length(new.aggregate_type) <= 63
       and length(new.aggregate_id) between 1 and 200
       and new.event_type ~ '^[a-z][a-z0-9_]*[.][a-z][a-z0-9_]*[.]v[1-9][0-9]*$' and length(new.event_type) <= 200
       and jsonb_typeof(new.payload) = 'object' and pg_column_size(new.payload) <= 262144
       and jsonb_typeof(new.headers) = 'object' and pg_column_size(new.headers) <= 16384
    then
        return new;
    end if;
    raise exception 'the outbox refuses the event: %', dovecote.refusal(new)
        using errcode = 'check_violation', schema = 'dovecote', table = 'outbox';
end $$;

create or replace function dovecote.refusal(event dovecote.outbox) returns text
language sql stable as $$
    -- Why the outbox refuses an event, in words; null when it takes it. The rules are check_event's.
    select case
        when event.id is null then 'id is null; leave it out'
        when get_byte(uuid_send(event.id), 6) >> 4 <> 7
            then format('id %s is not a UUIDv7; leave it out, or make one when the event is written', event.id)
        when abs(extract(epoch from dovecote.uuid_v7_time(event.id) - now())) > 86400
            then format('id %s is of %s, more than a day from now; make it when the event is written',
                        event.id, dovecote.uuid_v7_time(event.id))
        when event.aggregate_type is null or event.aggregate_type !~ '^[a-z][a-z0-9_]{0,62}$'
            then format('aggregate_type %L is not a lower-case word such as ''membership''', event.aggregate_type)
        when event.aggregate_id is null or length(event.aggregate_id) not between 1 and 200
            then format('aggregate_id must have 1 to 200 characters, got %s',
                        coalesce(length(event.aggregate_id)::text, 'null'))
        when event.event_type is null or length(event.event_type) > 200
             or event.event_type !~ '^[a-z][a-z0-9_]*[.][a-z][a-z0-9_]*[.]v[1-9][0-9]*$'
            then format('event_type %L is not <slice>.<fact>.v<n> such as ''billing.payment_recorded.v1''',
                        left(event.event_type, 200))
        when event.payload is null or jsonb_typeof(event.payload) <> 'object'
            then format('payload must be a JSON object, got %s', coalesce(jsonb_typeof(event.payload), 'null'))
        when pg_column_size(event.payload) > 262144
            then format('payload has %s bytes, at most 262144 are taken', pg_column_size(event.payload))
        when event.headers is null or jsonb_typeof(event.headers) <> 'object'
            then format('headers must be a JSON object, got %s', coalesce(jsonb_typeof(event.headers), 'null'))
        when pg_column_size(event.headers) > 16384
            then format('headers have %s bytes, at most 16384 are taken', pg_column_size(event.headers))
    end
$$;

drop function dovecote.json_text_bytes(jsonb, integer);
