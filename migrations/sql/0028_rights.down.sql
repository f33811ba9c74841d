revoke delete on dovecote.unrouted_types from dovecote_worker;
grant insert (created_at) on dovecote.outbox to dovecote_writer, dovecote_worker;

-- The columns' rights go with the tables'.
revoke all on
    dovecote.outbox, dovecote.outbox_events, dovecote.processed_events, dovecote.published_batches, dovecote.deliveries,
    dovecote.subscriptions, dovecote.progress, dovecote.postponed, dovecote.paused_handlers, dovecote.unrouted_types,
    dovecote.relay_state, dovecote.replays, dovecote.audit_log, dovecote.dropped_weeks, dovecote.challenges,
    dovecote.memberships, dovecote.billing_history, dovecote.price_quotes, dovecote.latest_prices,
    dovecote.verified_phones
    from dovecote_viewer, dovecote_service;
revoke all on sequence dovecote.outbox_position, dovecote.relay_beat from dovecote_viewer, dovecote_service;
revoke all on all functions in schema dovecote from dovecote_viewer, dovecote_service;
