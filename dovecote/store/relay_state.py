"""The one row of `relay_state`: which relay leads, in which epoch and history, and how far it has published.

Each statement of a leader names its epoch, and changes nothing once another relay has taken over.
"""

from dataclasses import dataclass

from dovecote.errors import NewerRelay
from dovecote.store.envelopes import Connection
from dovecote.store.runs import server_run

# An epoch in Redis may be so far ahead of the one in Postgres; see lua/claim.lua.
MAX_AHEAD = 1_000_000

#: A common table expression: the row of the leader of this epoch, locked. It is not written: each version of the row
#: would be read by the next statements for as long as anybody in the database holds a snapshot.
OWNER = "owner as (select epoch from dovecote.relay_state where epoch = %(epoch)s for no key update)"

# Beyond every epoch that either server has seen: Postgres may have been set back by many leaderships. Messages of a
# leader that did not sign are acted on by nobody: then no Redis is known. An epoch of Redis that is far ahead was made
# up (lua/claim.lua).
_TAKE_OVER = f"""
    update dovecote.relay_state as state
    set epoch = greatest(state.epoch, before.past) + 1, owner = %(owner)s, owned_since = clock_timestamp(),
        seen_at = clock_timestamp(), stands_back_for = null, signed_epoch = greatest(state.epoch, before.past) + 1,
        redis_run_id = case when before.signed_epoch = before.epoch then state.redis_run_id end
    from (select epoch, signed_epoch, case when %(past)s <= epoch + {MAX_AHEAD} then %(past)s else 0 end as past
          from dovecote.relay_state for no key update) as before
    returning state.epoch, checkpoint, redis_run_id, coalesce(history, ''), coalesce(instance, '')
"""  # noqa: S608 - put together from constants
# A statement after the take-over: from then on no earlier epoch moves it.
_LAST_HEARTBEAT = "select last_value from dovecote.relay_heartbeat"
_STAND_BACK = "update dovecote.relay_state set stands_back_for = %s where stands_back_for is distinct from %s"
# What Redis is given next must not be lost; batches may be, with what the same crash loses. It is flushed on this
# server only: a failover to a standby that has less is another run, and a missing standby must not block the leader.
_DURABLY = "set_config('synchronous_commit', 'local', true)"
_BEGIN_HISTORY = f"""
    update dovecote.relay_state set history = %s, instance = %s, redis_run_id = null where epoch = %s
    returning {_DURABLY}
"""  # noqa: S608 - put together from constants
_REMEMBER_REDIS = f"""
    update dovecote.relay_state set redis_run_id = %s where epoch = %s returning {_DURABLY}
"""  # noqa: S608 - as above
_FORGET_REDIS = "update dovecote.relay_state set redis_run_id = null where epoch = %s"
# The row is locked and not written, as for a batch. With a transaction id, so the commit is flushed.
_RECORD_HEARTBEAT = f"""
    select setval('dovecote.relay_heartbeat', %s), {_DURABLY}
    from (select from dovecote.relay_state where epoch = %s for no key update) as owner
"""  # noqa: S608 - as above
RECORD_CHECKPOINT = """
    update dovecote.relay_state set checkpoint = greatest(checkpoint, %s), seen_at = clock_timestamp()
    where epoch = %s
"""


@dataclass(frozen=True)
class TakenOver:
    """What a new leader starts from.

    known_redis       `<run id>@<epoch>` of the Redis that holds what was published, None for none
    history, instance the history that Redis was given, and the run of Postgres that gave it; empty for none
    run, heartbeat    this run of Postgres, and the last heartbeat in it
    """

    epoch: int
    checkpoint: int = 0
    known_redis: str | None = None
    history: str = ""
    instance: str = ""
    run: str = ""
    heartbeat: int = 0


def take_over(connection: Connection, past: int, owner: str) -> TakenOver:
    """Begin the next epoch, beyond the one that Redis has seen."""
    row = connection.execute(_TAKE_OVER, {"past": past, "owner": owner}).fetchone()
    assert row is not None, "relay_state has one row"
    (heartbeat,) = connection.execute(_LAST_HEARTBEAT).fetchone() or (0,)
    epoch, checkpoint, known, history, instance = row
    return TakenOver(epoch, checkpoint, known, history, instance, server_run(connection), heartbeat)


def stand_back(connection: Connection, instance: str) -> None:
    """Record that this relay stands back for the relay of another run of Postgres."""
    connection.execute(_STAND_BACK, (instance, instance))


def begin_history(connection: Connection, epoch: int, history: str, instance: str) -> None:
    """Record a new history, durably; no Redis is known to hold it. Errors: NewerRelay."""
    _as_leader(connection, epoch, _BEGIN_HISTORY, history, instance)


def remember_redis(connection: Connection, epoch: int, known: str) -> None:
    """Record, durably, which Redis holds what was published. Errors: NewerRelay."""
    _as_leader(connection, epoch, _REMEMBER_REDIS, known)


def forget_redis(connection: Connection, epoch: int) -> None:
    """Record that no Redis is known to hold what was published."""
    connection.execute(_FORGET_REDIS, (epoch,))


def record_heartbeat(connection: Connection, epoch: int, heartbeat: int) -> None:
    """Record the heartbeat, durably. Errors: NewerRelay."""
    _as_leader(connection, epoch, _RECORD_HEARTBEAT, heartbeat)


def record_checkpoint(connection: Connection, epoch: int, checkpoint: int) -> None:
    """Record up to where everything is published. Errors: NewerRelay."""
    _as_leader(connection, epoch, RECORD_CHECKPOINT, checkpoint)


def _as_leader(connection: Connection, epoch: int, statement: str, *parameters: object) -> None:
    require_leader(epoch, connection.execute(statement, (*parameters, epoch)).rowcount)


def require_leader(epoch: int, rows: int) -> None:
    """Errors: NewerRelay where a statement that names the epoch has found no row: another relay has taken over."""
    if rows != 1:
        raise NewerRelay(f"epoch {epoch} is over")
