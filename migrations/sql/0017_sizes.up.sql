-- Sizes are limited in the form that is worked with: the text of payload and headers, which is what travels. In the
-- column a value may be compressed, and a number of twelve bytes there, such as 1e131071, is 131 kB as text.

-- What the outbox takes ------------------------------------------------------------------------

create function dovecote.json_text_bytes(value jsonb, most integer) returns bigint
language plpgsql immutable set search_path = pg_catalog, dovecote, pg_temp as $$
-- The length of the value as text, in bytes; null where it is plain without that text that it is longer than `most`,
-- and where Postgres cannot make the text at all. No text far beyond `most` is made: a gigabyte of it could cost a small
-- machine its Postgres.
declare
    -- What it is when it is not compressed. Its text has at least a quarter of these bytes: "0, " takes twelve here.
    stored constant integer := pg_column_size(value #> '{}');
    numbers jsonb;
    bytes bigint := 0;
begin
    if stored > 4 * most + 1000 then
        return null;
    end if;
    -- With less than that, the longest numbers make 100 MB. In more they are added up, a few at once.
    if stored > 8000 then
        numbers := jsonb_path_query_array(value, 'strict $.** ? (@.type() == "number")');
        for low in 0 .. jsonb_array_length(numbers) - 1 by 250 loop
            bytes := bytes + octet_length(jsonb_path_query_array(
                numbers, '$[$low to $high]', jsonb_build_object('low', low, 'high', low + 249))::text);
            if bytes > 2::bigint * most then
                return null;  -- twice: of what is near the limit the very length is told
            end if;
        end loop;
    end if;
    return octet_length(value::text);
exception
    when program_limit_exceeded or statement_too_complex then
        return null;  -- nested too deeply
end $$;

create or replace function dovecote.refusal(event dovecote.outbox) returns text
language plpgsql stable set search_path = pg_catalog, dovecote, pg_temp as $$
-- Why the outbox refuses an event, in words; null when it takes it. The rules are check_event's.
declare
    bytes bigint;
begin
    if event.id is null then
        return 'id is null; leave it out';
    elsif get_byte(uuid_send(event.id), 6) >> 4 <> 7 then
        return format('id %s is not a UUIDv7; leave it out, or make one when the event is written', event.id);
    elsif abs(extract(epoch from dovecote.uuid_v7_time(event.id) - now())) > 86400 then
        return format('id %s is of %s, more than a day from now; make it when the event is written',
                      event.id, dovecote.uuid_v7_time(event.id));
    elsif event.aggregate_type is null or event.aggregate_type !~ '^[a-z][a-z0-9_]{0,62}$' then
        return format('aggregate_type %L is not a lower-case word such as ''membership''', event.aggregate_type);
    elsif event.aggregate_id is null or length(event.aggregate_id) not between 1 and 200 then
        return format('aggregate_id must have 1 to 200 characters, got %s',
                      coalesce(length(event.aggregate_id)::text, 'null'));
    elsif event.event_type is null or length(event.event_type) > 200
          or event.event_type !~ '^[a-z][a-z0-9_]*[.][a-z][a-z0-9_]*[.]v[1-9][0-9]*$' then
        return format('event_type %L is not <slice>.<fact>.v<n> such as ''billing.payment_recorded.v1''',
                      left(event.event_type, 200));
    elsif event.payload is null or jsonb_typeof(event.payload) <> 'object' then
        return format('payload must be a JSON object, got %s', coalesce(jsonb_typeof(event.payload), 'null'));
    elsif event.headers is null or jsonb_typeof(event.headers) <> 'object' then
        return format('headers must be a JSON object, got %s', coalesce(jsonb_typeof(event.headers), 'null'));
    end if;
    bytes := dovecote.json_text_bytes(event.payload, 262144);
    if bytes is null or bytes > 262144 then
        return format('payload has %s bytes as text, at most 262144 are taken', coalesce(bytes::text, 'far more than 262144'));
    end if;
    bytes := dovecote.json_text_bytes(event.headers, 16384);
    if bytes is null or bytes > 16384 then
        return format('headers have %s bytes as text, at most 16384 are taken', coalesce(bytes::text, 'far more than 16384'));
    end if;
    return null;
end $$;

create or replace function dovecote.check_event() returns trigger
language plpgsql as $$
-- What the outbox takes. Null is not true: what is missing is refused.
declare
    problem text;
begin
    if pg_catalog.get_byte(pg_catalog.uuid_send(new.id), 6) >> 4 = 7
       -- The first 48 bits of a UUIDv7 are Unix milliseconds; a day is 86,400,000 of them.
       and pg_catalog.abs(('x' || pg_catalog.encode(pg_catalog.substring(pg_catalog.uuid_send(new.id), 1, 6), 'hex'))::bit(48)::bigint
                          - pg_catalog.date_part('epoch', pg_catalog.now()) * 1000) <= 86400000
       -- A bound inside of the pattern, {0,62}, would take three times as long.
       and new.aggregate_type ~ '^[a-z][a-z0-9_]*$' and pg_catalog.length(new.aggregate_type) <= 63
       and pg_catalog.length(new.aggregate_id) between 1 and 200
       and new.event_type ~ '^[a-z][a-z0-9_]*[.][a-z][a-z0-9_]*[.]v[1-9][0-9]*$'
       and pg_catalog.length(new.event_type) <= 200
       and pg_catalog.jsonb_typeof(new.payload) = 'object' and pg_catalog.jsonb_typeof(new.headers) = 'object'
       -- Little enough to be made a text without a second thought: as a C string, with its zero at the end, in half
       -- the time. What is larger, or comes compressed from another table, is for `refusal` to judge.
       and pg_catalog.pg_column_compression(new.payload) is null
       and pg_catalog.pg_column_compression(new.headers) is null
       and pg_catalog.pg_column_size(new.payload) + pg_catalog.pg_column_size(new.headers) <= 8000
       and pg_catalog.pg_column_size(pg_catalog.jsonb_out(new.payload)) <= 262145
       and pg_catalog.pg_column_size(pg_catalog.jsonb_out(new.headers)) <= 16385
    then
        return new;
    end if;
    problem := dovecote.refusal(new);
    if problem is null then
        return new;
    end if;
    raise exception 'the outbox refuses the event: %', problem
        using errcode = 'check_violation', schema = 'dovecote', table = 'outbox';
end $$;

-- What the relay reads -------------------------------------------------------------------------

create function dovecote.small_envelope(fact dovecote.outbox) returns text
language sql stable parallel safe as $$
    -- The envelope of a row that is small as it is stored; null for the others, which `envelopes` makes one by one. A
    -- plain expression, so that it becomes part of the statement that reads.
    -- A type with a quote in it would be no JSON; to quote an identifier is the cheapest question for a word. With the
    -- underscore it is no key word such as `order`.
    select case
        when pg_catalog.quote_ident(fact.aggregate_type || '_') = fact.aggregate_type || '_'
             and pg_catalog.pg_column_compression(fact.payload) is null
             and pg_catalog.pg_column_size(fact.payload) < 4000
             and pg_catalog.pg_column_compression(fact.headers) is null
             and pg_catalog.pg_column_size(fact.headers) < 4000
        then dovecote.envelope(fact)
    end
$$;

create function dovecote.envelopes(ids uuid[], most_bytes bigint)
returns table (envelope bytea, problem text)
language plpgsql stable set search_path = pg_catalog, dovecote, pg_temp as $$
-- The envelopes of these events in UTF-8, in this order: at least one, and no more once they have `most_bytes`, or
-- once twenty could not be made, which may have taken a second.
-- Where it cannot be made, or would have more bytes than any message has room for, `problem` says why, and the others
-- are made all the same.
declare
    -- Of one envelope. What check_event lets in stays far below; this is for what has come past it, as in a restore.
    most_of_one constant integer := 1000000;
    made bigint := 0;
    failed integer := 0;
    fact dovecote.outbox;
begin
    for fact in
        select o.* from unnest(ids) with ordinality as wanted (id, place)
        left join lateral (select * from dovecote.outbox where id = wanted.id limit 1) o on true order by place
    loop
        envelope := null;
        problem := null;
        begin
            if fact.id is null then
                problem := 'it is not in the outbox any more';
            elsif fact.aggregate_type !~ '^[a-z0-9_]+$' or fact.event_type !~ '^[a-z0-9_.]+$' then
                problem := 'its aggregate_type or event_type is no lower-case word';
            else
                fact.payload := fact.payload #> '{}';  -- not compressed any more: it is looked at several times
                -- Less than that becomes no text that would be too much to make.
                if pg_column_size(fact.payload) > 8000
                   and dovecote.json_text_bytes(fact.payload, most_of_one) is null then
                    problem := format('its payload has more than %s bytes as text', most_of_one);
                elsif pg_column_size(fact.headers) > 100
                   and dovecote.json_text_bytes(fact.headers, most_of_one) is null then
                    problem := format('its headers have more than %s bytes as text', most_of_one);
                else
                    envelope := convert_to(dovecote.envelope(fact), 'UTF8');
                    if octet_length(envelope) > most_of_one then
                        problem := format('its envelope has %s bytes, at most %s are sent',
                                          octet_length(envelope), most_of_one);
                        envelope := null;
                    elsif envelope is null then
                        problem := 'it has a null where there must be none';
                    end if;
                end if;
            end if;
        exception
            when others then
                envelope := null;
                problem := format('Postgres cannot make its envelope: %s (SQLSTATE %s)', sqlerrm, sqlstate);
        end;
        return next;
        made := made + coalesce(octet_length(envelope), 0);
        failed := failed + (problem is not null)::integer;
        exit when made >= most_bytes or failed = 20;
    end loop;
end $$;

comment on function dovecote.envelopes is
    'For the relay: envelopes of rows that are large or compressed, each by itself, within a number of bytes.';
