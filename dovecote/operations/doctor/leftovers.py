"""Checks of what is left over: of queues and handlers that no route has, of dead messages, of events that are gone."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import psycopg
from dramatiq.common import dq_name

from dovecote.envelope.wire import EVENT_IDS_PATTERN
from dovecote.operations.doctor.finding import Finding, Subject, error, ok, warning
from dovecote.operations.handlers import WITHOUT_ROUTE, parameters_without_route
from dovecote.route import queues
from dovecote.store.unsendable import EventIsGone
from dovecote.telemetry.failures import fingerprint

_MAX_NAMED = 5
_MAX_COUNTED = 1_000

# Whose messages a queue has, as [handler, number, ...]. Redis reads them: only names go over the wire.
_HANDLERS_OF = """
    local counts, names, answer = {}, {}, {}
    local seen, cursor = 0, '0'
    repeat
        local page = redis.call('hscan', KEYS[1], cursor, 'count', 100)
        cursor = page[1]
        for i = 2, #page[2], 2 do
            local head = string.sub(page[2][i], 1, 1000)
            local name = string.match(head, '^%s*{.-"actor_name"%s*:%s*"([%w_.:-]*)"') or ''
            if not counts[name] then
                counts[name] = 0
                table.insert(names, name)
            end
            counts[name] = counts[name] + 1
            seen = seen + 1
        end
    until cursor == '0' or seen >= tonumber(ARGV[1])
    for _, name in ipairs(names) do
        table.insert(answer, name)
        table.insert(answer, counts[name])
    end
    return answer
"""
_HELD = ".held."

# Of one kind, so that an index finds them among any number of others.
_GONE = """
    with recursive failed (name) as (
        (select handler_name from dovecote.deliveries order by handler_name limit 1)
        union all
        select (select d.handler_name from dovecote.deliveries d where d.handler_name > failed.name
                order by d.handler_name limit 1) from failed where failed.name is not null
    )
    select d.handler_name, d.event_id, count(*) over () as events
    from failed cross join lateral (
        select d.handler_name, d.event_id from dovecote.deliveries d
        where d.state = 'dead' and d.handler_name = failed.name and d.error_fingerprint = %(fingerprint)s
        order by d.updated_at desc limit %(most)s) d
    limit %(most)s
"""


def unknown_queues(client: Any, subject: Subject) -> Finding:
    """Messages on queues without a route: of current handlers, of removed handlers, of other programs."""
    known = {name for queue in queues(subject.routes) for name in (queue, dq_name(queue))}
    strangers = sorted(name for name in _queues(client, subject) if name not in known and not name.endswith(".XQ"))
    queue_of = {route.handler: route.queue for route in subject.routes}
    held = {name: name.partition(_HELD)[2] for name in _names(client, subject, f"*{_HELD}*")}
    left_held = sorted(name for name, handler in held.items() if handler not in queue_of)
    if not strangers and not left_held:
        return ok("queues.known", "each queue belongs to a route, and so do all messages on it")
    described, has_ours, has_others = [], False, bool(left_held)
    for queue in strangers[:_MAX_NAMED]:
        key = f"{_prefix(subject)}{queue}.msgs"
        counts = _handlers_of(client, key)
        has_ours = has_ours or not queue_of.keys().isdisjoint(counts)
        has_others = has_others or not counts.keys() <= queue_of.keys()
        of = ", ".join(
            f"{number} of {handler or 'somebody else'}"
            + (f", whose queue is {queue_of[handler]} today" if handler in queue_of else "")
            for handler, number in counts.most_common(_MAX_NAMED)
        )
        described.append(f"{queue} ({client.hlen(key)}: {of})")
    for name in left_held[:_MAX_NAMED]:
        number = client.llen(f"{_prefix(subject)}{name}")
        described.append(f"{name.partition(_HELD)[0]} ({number} held for {held[name]}, which no route has)")
    advice = []
    if has_ours:
        advice.append(
            "The relay that leads moves the messages of its handlers to today's queue within a minute; those in the "
            "hands of workers of older code stay until these are done, or dead. Start a relay where none leads."
        )
    if has_others:
        advice.append(
            "Those of handlers that no route has stay: run code that has the handler on that queue once more. If the "
            "handler is gone for good, delete the queue's keys. If its events are wanted after all, "
            "`dovecote replay start --mode backfill` sends those that were not processed again, once a route has it."
        )
    return warning("queues.known", f"queues with messages that no route has: {'; '.join(described)}", " ".join(advice))


def dead_letters(client: Any, subject: Subject) -> Finding:
    """Messages that a consumer refused or Dramatiq dead-lettered. No process reads them again."""
    names = sorted(name for name in _queues(client, subject) if name.endswith(".XQ"))
    if not names:
        return ok("queues.dead_letters", "no message is dead")
    described = []
    for name in names[:_MAX_NAMED]:
        key = f"{_prefix(subject)}{name}.msgs"
        _, page = client.hscan(key, count=_MAX_NAMED)
        events = [id.decode() for message in page.values() for id in EVENT_IDS_PATTERN.findall(message)]
        handlers = ", ".join(name or "unreadable" for name in _handlers_of(client, key))
        some = f", with events such as {', '.join(events[:_MAX_NAMED])}" if events else ""
        described.append(f"{name.removesuffix('.XQ')} ({client.hlen(key)}, of {handlers}{some})")
    keys = f"{_prefix(subject)}<queue>.XQ and {_prefix(subject)}<queue>.XQ.msgs"
    return warning(
        "queues.dead_letters",
        f"dead messages in Redis: {'; '.join(described)}",
        "Postgres has the events: `dovecote replay start --handler HANDLER --mode backfill` sends again what the "
        "handler has not processed, which makes such a message superfluous. Why one was refused is in the consumers' "
        "log: no relay signed it as it is. Another program writes here, or somebody who has the password and should "
        "not; after a deploy, it may be from the version before. Then delete it: DEL "
        f"{keys}. Redis drops dead messages after seven days.",
    )


def handlers(connection: psycopg.Connection[Any], subject: Subject) -> Finding:
    """Handlers that Postgres knows and no route has."""
    rows = connection.execute(WITHOUT_ROUTE, parameters_without_route(subject.routes)).fetchall()
    if not rows:
        return ok("handlers.known", "each handler that Postgres knows has a route")
    described = [
        f"{row.name} ({row.retrying + row.waiting} waiting, {row.dead} dead, {len(row.event_types)} subscriptions)"
        for row in rows[:_MAX_NAMED]
    ]
    more = f" and {len(rows) - _MAX_NAMED} more" if len(rows) > _MAX_NAMED else ""
    return warning(
        "handlers.known",
        f"handlers that no route has: {', '.join(described)}{more}",
        "Their deliveries wait, and go on when code that has the handler leads again. What such a handler has not "
        "processed keeps weeks from being dropped. If it is gone for good: `dovecote deliveries discard --all-matching "
        "--handler NAME --state retrying --reason ...`, the same with `waiting` and `dead`, then "
        "`dovecote maintain --unsubscribe NAME`.",
    )


def gone_events(connection: psycopg.Connection[Any]) -> Finding:
    rows = connection.execute(_GONE, {"fingerprint": fingerprint(EventIsGone()), "most": _MAX_COUNTED}).fetchall()
    if not rows:
        return ok("deliveries.events", "no delivery is dead for want of its event")
    named = ", ".join(f"{row.handler_name} {row.event_id}" for row in rows[:_MAX_NAMED])
    at_least = "at least " if rows[0].events >= _MAX_COUNTED else ""
    return error(
        "deliveries.events",
        f"{at_least}{rows[0].events} deliveries whose event is not in the outbox: {named}",
        "Rows of dovecote.outbox were deleted, or this database was restored without them. Put them back with their "
        "ids and `dovecote deliveries retry` them, or `dovecote deliveries discard` them.",
    )


def _queues(client: Any, subject: Subject) -> Iterator[str]:
    return (name.removesuffix(".msgs") for name in _names(client, subject, "*.msgs"))


def _names(client: Any, subject: Subject, pattern: str) -> Iterator[str]:
    prefix = _prefix(subject)
    for key in client.scan_iter(match=prefix + pattern, count=1_000):
        yield key.decode("utf-8", "replace").removeprefix(prefix)


def _handlers_of(client: Any, key: str) -> "Counter[str]":
    answer = client.eval_ro(_HANDLERS_OF, 1, key, _MAX_COUNTED)
    return Counter(
        {name.decode(errors="replace"): int(number) for name, number in zip(answer[::2], answer[1::2], strict=True)}
    )


def _prefix(subject: Subject) -> str:
    return f"{subject.settings.redis.namespace}:"
