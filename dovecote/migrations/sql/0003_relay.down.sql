drop function dovecote.message_bytes, dovecote.envelopes, dovecote.small_envelope, dovecote.envelope,
              dovecote.not_in_outbox, dovecote.outbox_run, dovecote.server_run, dovecote.server_started,
              dovecote.active_writers, dovecote.low_watermark, dovecote.leader, dovecote.try_lock;
drop view dovecote.relay_leader, dovecote.outbox_events;
drop sequence dovecote.relay_heartbeat;
drop table dovecote.postponed, dovecote.unrouted_types, dovecote.published_batches, dovecote.relay_state;
