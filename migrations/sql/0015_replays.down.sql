drop index dovecote.deliveries_replay_idx;
alter table dovecote.deliveries drop column replay_id;
drop index dovecote.replays_active_idx;
alter table dovecote.replays
    drop column finished_at,
    drop column positions,
    drop column upto_position,
    drop column rate;
