drop view dovecote.outbox_events;
drop function dovecote.blocker, dovecote.ensure_partitions, dovecote.horizon, dovecote.envelope, dovecote.append_event;
drop table dovecote.audit_log, dovecote.replays, dovecote.relay_state, dovecote.subscriptions, dovecote.deliveries,
           dovecote.published_batches, dovecote.processed_events, dovecote.outbox;
drop sequence dovecote.outbox_position;
drop function dovecote.check_event, dovecote.announce, dovecote.leader_key, dovecote.bell_key, dovecote.floor_key,
              dovecote.uuid_v7_time, dovecote.uuid_v7_floor, dovecote.uuid_v7;
