-- What relays sign messages with (docs/adr/0034).

create table dovecote.message_keys (
    id          text        not null,
    secret      bytea,
    made_at     timestamptz not null default clock_timestamp(),
    revoked_at  timestamptz,
    constraint message_keys_pkey primary key (id),
    constraint message_keys_id_check check (id ~ '^[0-9a-f]{16}$'),
    constraint message_keys_secret_check check (octet_length(secret) = 32),
    constraint message_keys_revoked_check check ((secret is null) = (revoked_at is not null))
);

comment on table dovecote.message_keys is 'What relays sign messages with. A consumer acts on nothing else.';
comment on column dovecote.message_keys.secret is '32 bytes of randomness; gone with the revocation.';

create function dovecote.make_message_key() returns text
language plpgsql set search_path = pg_catalog, pg_temp as $$
-- Make a key and return its id. gen_random_uuid() has 122 bits of the server's strong randomness each time.
declare
    made text;
begin
    insert into dovecote.message_keys (id, secret)
    select left(encode(sha256(convert_to('id ' || gen_random_uuid(), 'UTF8')), 'hex'), 16),
           sha256(convert_to(concat(gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), gen_random_uuid()), 'UTF8'))
    returning message_keys.id into made;
    return made;
end $$;

create function dovecote.known_message_keys(
    out id text, out made_at timestamptz, out revoked_at timestamptz, out signs boolean)
returns setof record
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
-- Every key without its secret, newest first; `signs`: whether a relay signs with it (dovecote/envelope/signatures.py).
    select k.id, k.made_at, k.revoked_at,
           k.id is not distinct from (
               select n.id from dovecote.message_keys n where n.revoked_at is null
               order by greatest(n.made_at, statement_timestamp() - interval '5 seconds'), n.made_at desc, n.id limit 1)
    from dovecote.message_keys k order by k.made_at desc, k.id
$$;

create function dovecote.rotate_message_key(actor text, reason text default null) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
-- Make a key that relays sign with from the sixth second on, with a line in the audit log; return its id. The older
-- keys stay valid, for what is queued.
declare
    made text := dovecote.make_message_key();
begin
    perform set_config('synchronous_commit', 'on', true) where current_setting('synchronous_commit') = 'off';
    insert into dovecote.audit_log (actor, action, reason, affected, details)
    values (rotate_message_key.actor, 'keys.rotate', rotate_message_key.reason, 1, jsonb_build_object('key', made));
    return made;
end $$;

create function dovecote.revoke_message_key(key text, actor text, reason text) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
-- Let nothing that was signed with this key be acted on any more, with a line in the audit log. The relay sends again
-- what was queued with it.
declare
    known dovecote.message_keys;
begin
    -- One at a time, or two could revoke the last two.
    lock table dovecote.message_keys in share row exclusive mode;
    select * into known from dovecote.message_keys k where k.id = key;
    if not found then
        raise exception 'there is no message key %', key
            using errcode = 'no_data_found', hint = '`dovecote keys list` shows all.';
    elsif known.revoked_at is not null then
        raise exception 'message key % was revoked at %', key, known.revoked_at
            using errcode = 'object_not_in_prerequisite_state', hint = 'There is nothing left to do.';
    elsif not exists (select from dovecote.message_keys k where k.id <> key and k.revoked_at is null
                      and k.made_at < clock_timestamp() - interval '10 seconds') then
        raise exception 'message key % is the only one that relays and consumers all know', key
            using errcode = 'object_not_in_prerequisite_state',
                  hint = 'Run `dovecote keys rotate`, wait ten seconds, and revoke it then.';
    end if;
    perform set_config('synchronous_commit', 'on', true) where current_setting('synchronous_commit') = 'off';
    update dovecote.message_keys k set secret = null, revoked_at = clock_timestamp() where k.id = key;
    insert into dovecote.audit_log (actor, action, reason, affected, details)
    values (revoke_message_key.actor, 'keys.revoke', revoke_message_key.reason, 1, jsonb_build_object('key', key));
end $$;

select dovecote.make_message_key();

-- Rights ---------------------------------------------------------------------------------------

grant select on dovecote.message_keys to dovecote_worker;
grant execute on function dovecote.known_message_keys to dovecote_operator, dovecote_viewer;
grant execute on function dovecote.rotate_message_key, dovecote.revoke_message_key to dovecote_operator;
