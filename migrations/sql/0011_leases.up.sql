-- Which retries are on a queue: the relay can send again at once what was lost with Redis, or with the relay before it.
-- Expand only: a relay from before this migration notes no lease, and none of its leases ends early.

-- A retry is leased while this equals next_attempt_at: whoever gives it another time ends the lease with it.
alter table dovecote.deliveries add column leased_until timestamptz;

comment on column dovecote.deliveries.leased_until is 'Equals next_attempt_at while the retry is on a queue or in a worker''s hands.';
