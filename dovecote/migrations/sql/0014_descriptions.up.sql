-- What the columns mean that people query. docs/reference/tables.md is made of these comments; a test fails when one is
-- missing (tests/test_pages.py).

comment on table dovecote.replays is 'Every replay that was started: one handler and the events it gets again.';
comment on table dovecote.subscriptions is 'Which handler wants events of which type, and since when.';

comment on column dovecote.outbox.id is 'UUID version 7: begins with the time of writing.';
comment on column dovecote.outbox.position is 'Place in the order of writing. Positions may have gaps.';
comment on column dovecote.outbox.aggregate_type is 'Kind of what changed, such as order.';
comment on column dovecote.outbox.aggregate_id is 'Which one of them. Its events are kept in order.';
comment on column dovecote.outbox.event_type is 'Name and version on the wire, such as shop.order_placed.v1.';
comment on column dovecote.outbox.payload is
    'Fields of the event, as its class writes them; sensitive ones are encrypted.';
comment on column dovecote.outbox.headers is
    'What travels with it: correlation_id, traceparent, tracestate, and headers of the writer.';
comment on column dovecote.outbox.created_at is
    'When it was written, by the clock of Postgres; its transaction committed later.';

comment on column dovecote.outbox_events.id is 'UUID version 7: begins with the time of writing.';
comment on column dovecote.outbox_events.position is 'Place in the order of writing. Positions may have gaps.';
comment on column dovecote.outbox_events.aggregate_type is 'Kind of what changed, such as order.';
comment on column dovecote.outbox_events.aggregate_id is 'Which one of them. Its events are kept in order.';
comment on column dovecote.outbox_events.event_type is 'Name and version on the wire, such as shop.order_placed.v1.';
comment on column dovecote.outbox_events.payload is
    'Fields of the event, as its class writes them; sensitive ones are encrypted.';
comment on column dovecote.outbox_events.headers is
    'What travels with it: correlation_id, traceparent, tracestate, and headers of the writer.';
comment on column dovecote.outbox_events.created_at is
    'When it was written, by the clock of Postgres; its transaction committed later.';
comment on column dovecote.outbox_events.published_at is 'When the relay published it; null as long as it has not.';

comment on column dovecote.processed_events.event_id is 'The event.';
comment on column dovecote.processed_events.handler_name is 'The handler whose effect is committed.';
comment on column dovecote.processed_events.processed_at is 'When the transaction of the effect began to record it.';
comment on column dovecote.processed_events.replay_id is 'The replay that had it processed last, if one did.';

comment on column dovecote.deliveries.handler_name is 'The handler.';
comment on column dovecote.deliveries.event_id is 'The event.';
comment on column dovecote.deliveries.position is 'Its position in the outbox.';
comment on column dovecote.deliveries.aggregate_type is 'As in the outbox.';
comment on column dovecote.deliveries.aggregate_id is 'As in the outbox.';
comment on column dovecote.deliveries.event_type is 'As in the outbox.';
comment on column dovecote.deliveries.state is
    'retrying: sent again at next_attempt_at. waiting: behind an earlier event of its aggregate. dead: '
    'failed for good, until an operator retries or discards it. discarded: given up.';
comment on column dovecote.deliveries.attempts is 'How often it was tried. Outages do not count.';
comment on column dovecote.deliveries.next_attempt_at is 'When a retrying event is sent again.';
comment on column dovecote.deliveries.error_type is 'Class of the last error.';
comment on column dovecote.deliveries.error_fingerprint is
    'Kind of the failure: the same for the same error at the same place of the code.';
comment on column dovecote.deliveries.error is 'Traceback of the last error, with secrets and phone numbers masked.';
comment on column dovecote.deliveries.trace_id is 'Trace of the last attempt, where it was traced.';
comment on column dovecote.deliveries.first_failed_at is 'When it failed first.';
comment on column dovecote.deliveries.updated_at is 'When this row changed last.';
comment on column dovecote.deliveries.replay_id is 'The replay in which it failed; null for a live event.';

comment on column dovecote.subscriptions.handler_name is 'The handler.';
comment on column dovecote.subscriptions.event_type is 'A type that its route wants.';
comment on column dovecote.subscriptions.since_position is
    'Events at or below it were published before the handler existed: only a replay sends them.';
comment on column dovecote.subscriptions.created_at is 'When a relay first led with this handler and type.';

comment on column dovecote.paused_handlers.handler_name is 'The handler.';
comment on column dovecote.paused_handlers.state is 'paused, or resuming: its held messages return to the queue.';
comment on column dovecote.paused_handlers.actor is 'Who paused it, as the operator claimed.';
comment on column dovecote.paused_handlers.reason is 'Why, as the operator said.';
comment on column dovecote.paused_handlers.paused_at is 'Since when.';

comment on column dovecote.unrouted_types.event_type is 'The type.';
comment on column dovecote.unrouted_types.events is 'About how many events the relay met.';
comment on column dovecote.unrouted_types.first_position is 'The first one that it met.';
comment on column dovecote.unrouted_types.last_position is 'The last one that it met.';
comment on column dovecote.unrouted_types.first_seen_at is 'When it met the first.';
comment on column dovecote.unrouted_types.last_seen_at is 'When it met the last.';

comment on column dovecote.replays.id is 'The replay.';
comment on column dovecote.replays.actor is 'Who started it, as the operator claimed; audit_log has the login.';
comment on column dovecote.replays.reason is 'Why, as the operator said.';
comment on column dovecote.replays.mode is
    'backfill: events that the handler has not processed. reprocess: also those that it has.';
comment on column dovecote.replays.handler_name is 'The handler that gets the events.';
comment on column dovecote.replays.filter is 'Which events: the options of the command.';
comment on column dovecote.replays.state is 'pending, running, paused, cancelled or done.';
comment on column dovecote.replays.total is 'How many events matched when it was started.';
comment on column dovecote.replays.done is 'How many of them have been passed.';
comment on column dovecote.replays.cursor_position is
    'All matching events up to this position are processed, or have failed.';
comment on column dovecote.replays.created_at is 'When it was started.';
comment on column dovecote.replays.updated_at is 'When this row changed last.';
comment on column dovecote.replays.rate is 'Most events a second; null for as fast as they are processed.';
comment on column dovecote.replays.upto_position is 'The last position that matched when it was started.';
comment on column dovecote.replays.positions is 'For a replay of single events: their positions.';
comment on column dovecote.replays.finished_at is 'When it was done or cancelled.';

comment on column dovecote.audit_log.id is 'The line.';
comment on column dovecote.audit_log.at is 'When, by the clock of Postgres.';
comment on column dovecote.audit_log.action is 'What was done, such as deliveries.retry.';
comment on column dovecote.audit_log.reason is 'Why, as the operator said.';
comment on column dovecote.audit_log.details is 'The arguments of the action.';
comment on column dovecote.audit_log.affected is 'How many rows it changed, where it counts them.';

comment on column dovecote.dropped_partitions.id is 'The line.';
comment on column dovecote.dropped_partitions.week is 'The week, such as 2026w40.';
comment on column dovecote.dropped_partitions.lower_id is 'The least event id that the week could hold.';
comment on column dovecote.dropped_partitions.upper_id is 'The least event id after the week.';
comment on column dovecote.dropped_partitions.events is 'How many events were dropped.';
comment on column dovecote.dropped_partitions.processed is 'How many rows of processed_events were dropped.';
comment on column dovecote.dropped_partitions.first_position is 'The least position among the events.';
comment on column dovecote.dropped_partitions.last_position is 'The greatest position among the events.';
comment on column dovecote.dropped_partitions.first_created_at is 'When the first of them was written.';
comment on column dovecote.dropped_partitions.last_created_at is 'When the last of them was written.';
comment on column dovecote.dropped_partitions.archive is 'Where the archive is; null when there is none.';
comment on column dovecote.dropped_partitions.actor is
    'Who dropped it, as the operator claimed; audit_log has the login.';
comment on column dovecote.dropped_partitions.dropped_at is 'When.';
