"""Every table of the library, in one import: for Alembic, and for tests that compare models and schema."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import INT8MULTIRANGE, JSONB

from dovecote.database import metadata
from dovecote.outbox import outbox
from dovecote.processed_events import processed_events

__all__ = [
    "audit_log",
    "deliveries",
    "dropped_partitions",
    "message_keys",
    "metadata",
    "outbox",
    "paused_handlers",
    "postponed",
    "processed_events",
    "progress",
    "published_batches",
    "relay_state",
    "replays",
    "subscriptions",
    "unrouted_types",
]


def _timestamp(name: str, *, nullable: bool = False, default: bool = True) -> Column[object]:
    server_default = func.clock_timestamp() if default and not nullable else None
    return Column(name, DateTime(timezone=True), nullable=nullable, server_default=server_default)


published_batches = Table(
    "published_batches",
    metadata,
    Column("positions", INT8MULTIRANGE, nullable=False),
    Column("events", Integer, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    _timestamp("published_at"),
    Index("published_batches_positions_idx", "positions", postgresql_using="gist"),
    Index("published_batches_published_at_idx", "published_at"),
    postgresql_partition_by="RANGE (published_at)",
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("handler_name", Text, primary_key=True),
    Column("event_id", Uuid, primary_key=True),
    Column("position", BigInteger, nullable=False),
    Column("aggregate_type", Text, nullable=False),
    Column("aggregate_id", Text, nullable=False),
    Column("event_type", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    _timestamp("next_attempt_at", nullable=True),
    Column("error_type", Text),
    Column("headline", Text),
    Column("error_fingerprint", Text),
    Column("error", Text),
    Column("trace_id", Text),
    _timestamp("first_failed_at"),
    _timestamp("updated_at"),
    _timestamp("leased_until", nullable=True),
    Column("replay_id", Uuid),
    _timestamp("first_leased_at", nullable=True),
    CheckConstraint("state in ('retrying', 'waiting', 'dead', 'discarded')", name="deliveries_state_is_known"),
    Index("deliveries_due_idx", "next_attempt_at", postgresql_where=text("state = 'retrying'")),
    Index(
        "deliveries_due_of_handler_idx",
        "handler_name",
        "next_attempt_at",
        "position",
        postgresql_where=text("state = 'retrying'"),
    ),
    Index(
        "deliveries_aggregate_idx",
        "handler_name",
        "aggregate_type",
        "aggregate_id",
        "position",
        postgresql_where=text("state = 'waiting'"),
    ),
    Index("deliveries_listing_idx", "handler_name", "state", "position"),
    Index("deliveries_group_idx", "state", "handler_name", "error_fingerprint", "updated_at"),
    Index(
        "deliveries_replay_idx",
        "replay_id",
        "aggregate_type",
        "aggregate_id",
        "position",
        postgresql_where=text("replay_id is not null"),
    ),
)

message_keys = Table(
    "message_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("secret", LargeBinary),
    _timestamp("made_at"),
    _timestamp("revoked_at", nullable=True),
    CheckConstraint("id ~ '^[0-9a-f]{16}$'", name="message_keys_id_check"),
    CheckConstraint("octet_length(secret) = 32", name="message_keys_secret_check"),
    CheckConstraint("(secret is null) = (revoked_at is not null)", name="message_keys_revoked_check"),
)

paused_handlers = Table(
    "paused_handlers",
    metadata,
    Column("handler_name", Text, primary_key=True),
    Column("state", Text, nullable=False, server_default=text("'paused'")),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    _timestamp("paused_at"),
    CheckConstraint("state in ('paused', 'resuming')", name="paused_handlers_state_is_known"),
)

subscriptions = Table(
    "subscriptions",
    metadata,
    Column("handler_name", Text, primary_key=True),
    Column("event_type", Text, primary_key=True),
    Column("since_position", BigInteger, nullable=False),
    _timestamp("created_at"),
    Column("routed_epoch", BigInteger),
    Column("published_above", INT8MULTIRANGE, nullable=False, server_default=text("'{}'")),
    Column("replayable", Boolean),
    Column("ordered", Boolean),
)

progress = Table(
    "progress",
    metadata,
    Column("handler_name", Text, primary_key=True),
    Column("examined", BigInteger, nullable=False),
    Column("open", INT8MULTIRANGE, nullable=False, server_default=text("'{}'")),
    Column("low_water_mark", BigInteger, Computed("coalesce(lower(open) - 1, examined)", persisted=True)),
    _timestamp("moved_at"),
    CheckConstraint(
        "open <@ int8multirange(int8range(null::bigint, examined, '(]'))", name="progress_open_is_examined"
    ),
)

postponed = Table(
    "postponed",
    metadata,
    Column("handler_name", Text, primary_key=True),
    Column("after_position", BigInteger, nullable=False),
    _timestamp("since"),
)

relay_state = Table(
    "relay_state",
    metadata,
    Column("only_row", Boolean, primary_key=True, server_default=text("true")),
    Column("checkpoint", BigInteger, nullable=False, server_default=text("0")),
    Column("epoch", BigInteger, nullable=False, server_default=text("0")),
    Column("owner", Text),
    _timestamp("owned_since", nullable=True),
    _timestamp("seen_at", nullable=True),
    Column("redis_run_id", Text),
    Column("history", Text),
    Column("instance", Text),
    Column("stands_back_for", Text),
    _timestamp("refused_since", nullable=True),
    Column("signed_epoch", BigInteger),
)

replays = Table(
    "replays",
    metadata,
    Column("id", Uuid, primary_key=True, server_default=func.dovecote.uuid_v7()),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("mode", Text, nullable=False),
    Column("handler_name", Text, nullable=False),
    Column("filter", JSONB, nullable=False),
    Column("state", Text, nullable=False, server_default=text("'pending'")),
    Column("total", BigInteger),
    Column("done", BigInteger, nullable=False, server_default=text("0")),
    Column("cursor_position", BigInteger, nullable=False, server_default=text("0")),
    _timestamp("created_at"),
    _timestamp("updated_at"),
    Column("rate", Integer),
    Column("upto_position", BigInteger, nullable=False, server_default=text("0")),
    Column("positions", INT8MULTIRANGE),
    _timestamp("finished_at", nullable=True),
    Column("problem", Text),
    Index(
        "replays_active_idx",
        "handler_name",
        unique=True,
        postgresql_where=text("state in ('pending', 'running', 'paused')"),
    ),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", Uuid, primary_key=True, server_default=func.dovecote.uuid_v7()),
    _timestamp("at"),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("reason", Text),
    Column("details", JSONB, nullable=False, server_default=text("'{}'")),
    Column("login", Text, nullable=False, server_default=text("SESSION_USER")),
    Column("affected", BigInteger),
)

dropped_partitions = Table(
    "dropped_partitions",
    metadata,
    Column("id", Uuid, primary_key=True, server_default=func.dovecote.uuid_v7()),
    Column("week", Text, nullable=False),
    Column("lower_id", Uuid, nullable=False),
    Column("upper_id", Uuid, nullable=False),
    Column("events", BigInteger, nullable=False),
    Column("processed", BigInteger, nullable=False),
    Column("first_position", BigInteger),
    Column("last_position", BigInteger),
    _timestamp("first_created_at", nullable=True),
    _timestamp("last_created_at", nullable=True),
    Column("archive", Text),
    Column("checksum", Text),
    Column("actor", Text, nullable=False),
    _timestamp("dropped_at"),
    Index("dropped_partitions_ids_idx", "lower_id"),
)

unrouted_types = Table(
    "unrouted_types",
    metadata,
    Column("event_type", Text, primary_key=True),
    Column("events", BigInteger, nullable=False),
    Column("first_position", BigInteger, nullable=False),
    Column("last_position", BigInteger, nullable=False),
    _timestamp("first_seen_at"),
    _timestamp("last_seen_at"),
)
