-- A replay runs in the relay, wave by wave; its row holds what the next relay needs to go on.

alter table dovecote.replays
    -- Most events a second; null is as fast as they are acted on.
    add column rate          integer,
    -- The last position that matched when the replay was asked for. `cursor_position` says how far all is settled:
    -- acted on, or in `deliveries`.
    add column upto_position bigint not null default 0,
    -- For a replay of single events: where they are.
    add column positions     int8multirange,
    add column finished_at   timestamptz;

-- Two at once for one handler would each take the other's events for done.
create unique index replays_active_idx on dovecote.replays (handler_name)
    where state in ('pending', 'running', 'paused');

-- The replay that failed on this event: its retry acts again, once.
alter table dovecote.deliveries add column replay_id uuid;

create index deliveries_replay_idx
    on dovecote.deliveries (replay_id, aggregate_type, aggregate_id, position) where replay_id is not null;
