-- Challenges that prove a phone number, and the numbers proven. No number and no code in the clear.

create table dovecote.challenges (
    id               uuid        not null,
    user_id          text        not null,
    phone_hash       text        not null,
    phone_ciphertext text        not null,
    phone_last4      text        not null,
    code_hash        text        not null,
    expires_at       timestamptz not null,
    tries_left       integer     not null,
    created_at       timestamptz not null,
    constraint challenges_pkey primary key (id),
    constraint challenges_one_per_user_and_phone unique (user_id, phone_hash),
    constraint challenges_phone_hash_is_a_sha_256 check (phone_hash ~ '^[0-9a-f]{64}$'),
    constraint challenges_phone_is_encrypted check (phone_ciphertext ~ '^[A-Za-z0-9_-]+:[A-Za-z0-9+/]{38,}=*$'),
    constraint challenges_phone_last4_is_four_digits check (phone_last4 ~ '^[0-9]{4}$'),
    constraint challenges_code_hash_is_a_sha_256 check (code_hash ~ '^[0-9a-f]{64}$'),
    constraint challenges_tries_are_not_negative check (tries_left >= 0),
    constraint challenges_expire_after_they_begin check (created_at < expires_at)
);

comment on table dovecote.challenges is
    'Open attempts to prove a phone number; a right answer or a newer request removes the row.';
comment on column dovecote.challenges.phone_hash is 'HMAC-SHA-256 of the E.164 number, in hex.';
comment on column dovecote.challenges.phone_ciphertext is
    '<key id>:<base64 of nonce and AES-256-GCM ciphertext>, bound to the id of this row.';
comment on column dovecote.challenges.code_hash is 'HMAC-SHA-256 of the code and the id of this row, in hex.';

create index challenges_expiry_idx on dovecote.challenges (expires_at);

create table dovecote.verified_phones (
    user_id     text        not null,
    phone_hash  text        not null,
    verified_at timestamptz not null,
    constraint verified_phones_pkey primary key (user_id, phone_hash),
    constraint verified_phones_phone_hash_is_a_sha_256 check (phone_hash ~ '^[0-9a-f]{64}$')
);

comment on table dovecote.verified_phones is 'Which user has proven which number, and when last.';

-- What phone numbers and users have used of their codes and answers, beyond one challenge: limits are taken from it.
-- Rows older than a day are removed with expired challenges.
create table dovecote.verification_quotas (
    kind       text          not null,
    subject    text          not null,
    codes_at   timestamptz[] not null,
    answers_at timestamptz[] not null,
    last_at    timestamptz   not null,
    constraint verification_quotas_pkey primary key (kind, subject),
    constraint verification_quotas_kind_is_known check (kind in ('phone', 'user')),
    constraint verification_quotas_phone_is_a_sha_256 check (kind <> 'phone' or subject ~ '^[0-9a-f]{64}$')
);

comment on table dovecote.verification_quotas is
    'When codes were requested and answers judged lately, for each phone number and each user.';
comment on column dovecote.verification_quotas.subject is 'The HMAC-SHA-256 of an E.164 number, in hex, or a user id.';
comment on column dovecote.verification_quotas.last_at is 'The latest of all times; a day later the row is removed.';

create index verification_quotas_last_idx on dovecote.verification_quotas (last_at);

-- Of a challenge, not the encrypted number and not the code's hash: nobody who looks has a use for them. A verified phone
-- is deleted for a user who wants to be deleted.

grant select, insert, update, delete on dovecote.challenges, dovecote.verified_phones, dovecote.verification_quotas
    to dovecote_service, dovecote_worker;
grant select (id, user_id, phone_hash, phone_last4, expires_at, tries_left, created_at)
    on dovecote.challenges
    to dovecote_operator, dovecote_viewer;
grant select on dovecote.verified_phones, dovecote.verification_quotas to dovecote_operator, dovecote_viewer;
