-- What phone numbers and users have used of their codes and answers, beyond one challenge: limits are taken from it.
-- Rows older than a day are removed with expired challenges. The code before this revision does not count: limits hold
-- once every process that asks and answers is new.

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
comment on column dovecote.verification_quotas.last_at is 'The latest of all moments; a day later the row is removed.';

create index verification_quotas_last_idx on dovecote.verification_quotas (last_at);

grant select, insert, update, delete on dovecote.verification_quotas to dovecote_worker, dovecote_service;
grant select on dovecote.verification_quotas to dovecote_operator, dovecote_viewer;
-- For a user who wants to be forgotten.
grant delete on dovecote.verified_phones to dovecote_worker, dovecote_service;
