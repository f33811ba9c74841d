"""Checks of what is on the queues and who takes it."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg
import redis

from dovecote.broker.redis_client import connect_redis, is_wrong_type
from dovecote.masking import masked
from dovecote.operations.doctor import leftovers
from dovecote.operations.doctor.finding import Finding, Subject, error, ok, warning
from dovecote.operations.doctor.postgres import session
from dovecote.route import queues
from dovecote.store.checks import POSTPONED

_SOCKET_SECONDS = 5.0
_SECOND_CHECK_SECONDS = 1.0


class _Held(NamedTuple):
    worker: str
    queue: str
    messages: int
    is_alive: bool


def findings(subject: Subject) -> list[Finding]:
    """Return the findings of this group; none when Redis is away, which another check reports."""
    client: Any = connect_redis(subject.settings.redis.url.get_secret_value(), _SOCKET_SECONDS)
    try:
        held = list(_held(client, subject))
        return [
            unserved(client, subject, held),
            dead_workers(held, subject),
            leftovers.unknown_queues(client, subject),
            leftovers.dead_letters(client, subject),
            *postponed(client, subject),
        ]
    except redis.ResponseError as caught:
        if not is_wrong_type(caught):
            return []
        return [
            error(
                "queues.keys",
                f"a key of ours is of another type than ours: {masked(str(caught))}",
                "Somebody else writes to this Redis under our names. The relay that leads deletes such a key within "
                "seconds, and sends what was lost again. Find out who has the password; see SECURITY.md.",
            )
        ]
    except redis.RedisError:
        return []
    finally:
        client.close()


def unserved(client: Any, subject: Subject, held: list[_Held]) -> Finding:
    """Consumers prefetch messages: a queue with messages, none of them prefetched, has no consumer."""
    served = {one.queue for one in held if one.is_alive}
    heads = {queue: _head(client, subject, queue) for queue in queues(subject.routes) if queue not in served}
    waiting = {queue: head for queue, head in heads.items() if head is not None}
    if waiting:
        time.sleep(_SECOND_CHECK_SECONDS)  # what has just come is taken by then
        served = {one.queue for one in _held(client, subject) if one.is_alive}
        waiting = {
            queue: head
            for queue, head in waiting.items()
            if queue not in served and _head(client, subject, queue) == head
        }
    if waiting:
        counts = ", ".join(f"{queue} ({client.llen(_key(subject, queue))})" for queue in sorted(waiting))
        return error(
            "queues.served",
            f"messages that nobody takes: {counts}",
            "Start consumers that serve these queues: `dramatiq dovecote.bootstrap:consumers` (see Procfile).",
        )
    return ok("queues.served", "no queue has messages that nobody takes")


def dead_workers(held: list[_Held], subject: Subject) -> Finding:
    """The relay reaps within seconds, a queue that no route has within a minute; what stays, stays without a relay."""
    dead = [one for one in held if not one.is_alive]
    if not dead:
        return ok("queues.dead_workers", "no dead worker holds messages")
    names = ", ".join(f"{one.messages} of {one.queue} by {one.worker}" for one in dead[:5])
    seconds = subject.settings.consumers.heartbeat_timeout_ms / 1_000 + 5
    return warning(
        "queues.dead_workers",
        f"dead workers hold messages: {names}",
        f"A relay takes them back within {seconds:g} s; where they stay, no relay leads.",
    )


def postponed(client: Any, subject: Subject) -> list[Finding]:
    """Report which queues are full; nothing when Postgres is away or not migrated, which another check reports."""
    try:
        with session(subject) as connection:
            rows = connection.execute(POSTPONED).fetchall()
    except psycopg.Error:
        return []
    queue_of = {route.handler: route.queue for route in subject.routes}
    described = [
        f"{row.handler_name} for {row.seconds:.0f} s ({_bytes(client, subject, queue_of[row.handler_name]):,} bytes on "
        f"{queue_of[row.handler_name]})"
        for row in rows
        if row.handler_name in queue_of
    ]
    if not described:
        return [ok("queues.postponed", "no queue is full")]
    return [
        warning(
            "queues.postponed",
            f"handlers whose queue is full, and whose events stay in the outbox for now: {', '.join(described)}",
            "Start its consumers, or more of them; what was left out follows, in order, when the queue has room. With "
            "memory to spare, raise DOVECOTE_RELAY__QUEUE_BYTES, or Redis's maxmemory: each queue has a share of it.",
        )
    ]


def _bytes(client: Any, subject: Subject, queue: str) -> int:
    return int(client.memory_usage(f"{_key(subject, queue)}.msgs") or 0)


def _held(client: Any, subject: Subject) -> Iterator[_Held]:
    prefix = f"{subject.settings.redis.namespace}:"
    seconds, microseconds = client.time()
    since = (seconds * 1_000 + microseconds / 1_000) - subject.settings.consumers.heartbeat_timeout_ms
    alive = {
        worker.decode(errors="replace") for worker in client.zrangebyscore(f"{prefix}__heartbeats__", since, "+inf")
    }
    for key in _keys(client, f"{prefix}__acks__.*"):
        worker, _, queue = key.decode(errors="replace").removeprefix(f"{prefix}__acks__.").partition(".")
        yield _Held(worker, queue, int(client.scard(key)), worker in alive)


def _keys(client: Any, pattern: str) -> Iterator[bytes]:
    yield from client.scan_iter(match=pattern, count=1_000)


def _key(subject: Subject, queue: str) -> str:
    return f"{subject.settings.redis.namespace}:{queue}"


def _head(client: Any, subject: Subject, queue: str) -> bytes | None:
    head: bytes | None = client.lindex(_key(subject, queue), 0)
    return head
