-- What the roles of 0028 may, and what writers may say no more.

-- Those who look ---------------------------------------------------------------------------------
-- What an operator sees, and no right to change, lock or notify anything.

grant select on
    dovecote.outbox, dovecote.outbox_events, dovecote.processed_events, dovecote.published_batches, dovecote.deliveries,
    dovecote.subscriptions, dovecote.progress, dovecote.postponed, dovecote.paused_handlers, dovecote.unrouted_types,
    dovecote.relay_state, dovecote.replays, dovecote.audit_log, dovecote.dropped_weeks,
    dovecote.memberships, dovecote.billing_history, dovecote.price_quotes, dovecote.latest_prices,
    dovecote.verified_phones
    to dovecote_viewer;
-- Not the encrypted number and not the code's hash.
grant select (id, user_id, phone_hash, phone_last4, expires_at, tries_left, created_at)
    on dovecote.challenges to dovecote_viewer;
grant select on sequence dovecote.outbox_position, dovecote.relay_beat to dovecote_viewer;
grant execute on function
    dovecote.uuid_v7, dovecote.uuid_v7_floor, dovecote.uuid_v7_time, dovecote.floor_key, dovecote.bell_key,
    dovecote.leader_key, dovecote.progress_key, dovecote.release_key, dovecote.fact_of, dovecote.week_suffix,
    dovecote.week_monday, dovecote.json_text_bytes,
    dovecote.envelope, dovecote.small_envelope, dovecote.envelopes, dovecote.message_bytes, dovecote.horizon,
    dovecote.writers_at_work, dovecote.blocker, dovecote.blockers, dovecote.wanted_since, dovecote.coarser,
    dovecote.absent, dovecote.events_in, dovecote.unsettled_of, dovecote.unprocessed, dovecote.settled_upto,
    dovecote.server_started, dovecote.server_run, dovecote.outbox_run, dovecote.not_in_outbox, dovecote.sequence_state,
    dovecote.sequence_fault, dovecote.never_read, dovecote.week_obstacles, dovecote.processed_lately
    to dovecote_viewer;

-- Services that own slices -----------------------------------------------------------------------
-- A writer that keeps the state as well of which it tells.

grant insert (id, aggregate_type, aggregate_id, event_type, payload, headers) on dovecote.outbox to dovecote_service;
grant usage, select on sequence dovecote.outbox_position to dovecote_service;
grant execute on function
    dovecote.uuid_v7, dovecote.uuid_v7_floor, dovecote.uuid_v7_time, dovecote.floor_key, dovecote.bell_key,
    dovecote.fact_of, dovecote.json_text_bytes, dovecote.refusal, dovecote.append_event
    to dovecote_service;

grant select, insert, update on dovecote.memberships to dovecote_service;
grant select, insert on dovecote.billing_history to dovecote_service;
grant select, insert, update on dovecote.price_quotes, dovecote.latest_prices to dovecote_service;
grant select, insert, update, delete on dovecote.challenges to dovecote_service;
grant select, insert, update on dovecote.verified_phones to dovecote_service;

-- The relay --------------------------------------------------------------------------------------
-- A writer may invent types without end: the relay keeps the ones that it met last.

grant delete on dovecote.unrouted_types to dovecote_worker;

-- Writers ----------------------------------------------------------------------------------------
-- When an event was written is the server's own word. No code of ours has ever given it.

revoke insert (created_at) on dovecote.outbox from dovecote_writer, dovecote_worker;
