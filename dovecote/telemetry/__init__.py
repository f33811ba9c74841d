"""Logs, traces and metrics, set up once per process. This docstring is the catalogue.

Logs     one line an event, to stderr: time, level, what happened, then fields as key=value or JSON. Always
         `component`. While an event is handled, every line has `handler`, `event_id`, `aggregate` (type and id),
         `correlation_id`, and `trace_id` and `span_id` where its writer traces; for a bundle that is taken at once
         `handler` and `events`, how many. Secrets and phone numbers are masked in every value, whatever put them there.
Traces   one from the writer over the relay to the handler, in the writer's trace where the writer samples it:
           send <queue>      producer; the relay, for each message that the event goes out in
           process <queue>   consumer; each call of a handler, and its failure: error.type, status, exception
         with messaging.message.id (the event's), messaging.message.conversation_id (its correlation id),
         messaging.destination.name (queue), messaging.consumer.group.name (handler). Of many events at once, in
         traces of their own, of which DOVECOTE_TELEMETRY__SAMPLE_RATIO are kept, linked to the writers' spans:
           publish           producer; a batch of the relay
           consume <queue>   consumer; a bundle
         with messaging.batch.message_count. All have messaging.system and messaging.operation.name and .type.
         The resource says service.name, .version, .instance.id, host.name, process.pid and dovecote.component.
         They are exported over OTLP/HTTP when DOVECOTE_TELEMETRY__OTLP_ENDPOINT is set, masked as logs are.
Metrics  at /metrics, beside /health/live and /health/ready, when DOVECOTE_TELEMETRY__HTTP_PORT is set. Events, bundles
         and messages are counted from the start of the process, or of the Dramatiq master of consumers.

Of each relay:

    dovecote_heartbeat_timestamp_seconds gauge: last sign of life, in Unix time
    dovecote_relay_state{state} gauge: 1 for what it does, of starting, leading, standing_by, standing_back (a relay
        of a newer database uses our Redis), refuses (to lead: dovecote_sequence_fault), sending_again (looking for
        what Redis or Postgres has lost), waiting_for_postgres, waiting_for_redis, waiting_for_schema,
        waiting_for_standby (DOVECOTE_RELAY__PUBLISH_AFTER)
    dovecote_published_events_total counter: events recorded as published
    dovecote_published_bundles_total counter: messages of batches and retries put on queues
    dovecote_batch_events histogram: events of a batch; its count is the number of batches
    dovecote_retried_events_total counter: deliveries sent once more
    dovecote_republished_bundles_total counter: messages sent again because Redis had lost them
    dovecote_reconciled_events_total{handler} counter: events that a queue had lost, sent again
    dovecote_reaped_messages_total counter: messages requeued from dead workers
    dovecote_wakeups_total counter: times a writer woke the relay

Of the whole system, asked when a relay is scraped, and kept for 5 s. Every relay reports them: take the largest. "At
least": a count looks at a bounded number of rows, as that of `dovecote status` does.

    dovecote_up{server} gauge: 1 when the server (postgres, redis) answers
    dovecote_clock_skew_seconds{server} gauge: how far its clock is ahead of that of the relay's machine
    dovecote_leader_present gauge: 1 when a relay leads
    dovecote_sequence_fault gauge: 1 when positions are not handed out in order; no relay leads until `dovecote recover`
    dovecote_foreign_locks{purpose} gauge: locks of ours (announcement, wake-up, leadership, release, table) that
        sessions hold or wait for with no use for them; `dovecote doctor` names them
    dovecote_lag_events gauge: committed and not yet published; at least
    dovecote_lag_seconds gauge: age of the oldest of them; 0 for none
    dovecote_unprocessed_events{handler} gauge: neither acted on nor given up, published or not; exact up to 20,000, at
        least beyond, and while the relay examines a history for the first time
    dovecote_oldest_unprocessed_seconds{handler} gauge: age of the oldest of them; 0 for none
    dovecote_handler_low_water_mark_lag_events{handler} gauge: positions from the handler's low-water mark, up to which
        all is acted on or has failed, to the relay's checkpoint. No sample before a relay has led with the handler
    dovecote_deliveries{handler,state} gauge: retrying, waiting, dead, discarded; at least
    dovecote_blocked_aggregates{handler} gauge: aggregates that an ordered handler cannot go on with; at least
    dovecote_paused_seconds{handler} gauge: how long the handler has been paused; 0 when it is not
    dovecote_postponed_seconds{handler} gauge: how long its events have been kept in the outbox because its queue is
        full, until it has caught up; 0 when they are not
    dovecote_redis_dead_letters{queue} gauge: messages that a consumer could not read or gave up, in Redis; `dovecote
        doctor` says which, also on queues that no route has
    dovecote_unrouted_events gauge: events the relay met, of types that have no route
    dovecote_active_writers gauge: transactions that are writing to the outbox
    dovecote_oldest_writer_seconds gauge: age of the one with the lowest low-water mark; 0 for none, and where our login
        may not see it (pg_read_all_stats)
    dovecote_partition_headroom_seconds gauge: how long the partitions made ahead last
    dovecote_default_partition_in_use gauge: 1 when rows lie outside of every week
    dovecote_notify_queue_usage gauge: which part of Postgres's queue of notifications is in use, 0 to 1; from 0.5 on
        nobody is woken, and the relay polls

Of consumers; one port reports for all worker processes of a Dramatiq master:

    dovecote_heartbeat_timestamp_seconds{pid} gauge: last sign of life of the worker's fetching threads, in Unix time
    dovecote_in_flight_seconds{pid} gauge: age of its oldest bundle in flight, to the second. Idle is 0 and a
        fresh heartbeat; stuck is a number that grows and grows
    dovecote_processed_events_total{handler} counter: events whose effect is committed
    dovecote_failed_events_total{handler,state} counter: failures; the event is retrying or dead then
    dovecote_parked_events_total{handler} counter: events put behind an earlier one of their aggregate
    dovecote_phantom_events_total{handler} counter: events passed over, because they are not in the outbox: Postgres has
        forgotten them, after a restore or a failover
    dovecote_refused_messages_total{queue,reason} counter: messages that nobody acts on: unsigned, forged, unknown_key,
        misplaced (made for another queue or id), unreadable, too_large, failed (requeued time after time)
    dovecote_bundle_events{handler} histogram: events of a bundle
    dovecote_handler_duration_seconds{handler} histogram: one call of the handler: an event, or with `bulk` a bundle
    dovecote_commit_to_effect_seconds{handler} histogram: from the event's row to the commit of its effect; no replays
"""
