"""Checks of the Redis server."""

from typing import Any

import redis

from dovecote.broker.redis_client import connect_redis
from dovecote.masking import masked
from dovecote.operations.doctor import encryption
from dovecote.operations.doctor.finding import Finding, Subject, error, ok, skew, warning

_SOCKET_SECONDS = 5.0
# BLMOVE, which our consumers wait with, is of 6.2.
_OLDEST_REDIS = (6, 2)
_MAX_KEYS = 20_000


def findings(subject: Subject) -> list[Finding]:
    """Return the findings of this group; without a connection, that is the only finding."""
    client: Any = connect_redis(subject.settings.redis.url.get_secret_value(), _SOCKET_SECONDS)
    try:
        info: dict[str, Any] = client.info()
        return [
            ok("redis.reachable", f"run id {info.get('run_id')}"),
            version(info),
            encrypted(subject),
            append_only(info),
            eviction(info),
            own_database(client, subject),
            clock(client, subject),
        ]
    except redis.RedisError as caught:
        advice = (
            "Start Redis, or mend REDIS_URL, the network, the password; nothing is lost meanwhile, all waits for it."
        )
        return [error("redis.reachable", masked(f"{type(caught).__name__}: {caught}"), advice)]
    finally:
        client.close()


def version(info: dict[str, Any]) -> Finding:
    # Valkey says which Redis it is compatible with.
    described = str(info.get("redis_version", "0"))
    found = (
        f"Valkey {info['valkey_version']} (as Redis {described})" if "valkey_version" in info else f"Redis {described}"
    )
    if tuple(int(part) for part in described.split(".")[:2]) < _OLDEST_REDIS:
        return error("redis.version", found, "Upgrade to Redis 6.2 or newer: consumers wait with BLMOVE.")
    return ok("redis.version", found)


def encrypted(subject: Subject) -> Finding:
    urls = {"REDIS_URL": subject.settings.redis.url, "DOVECOTE_REDIS__CACHE_URL": subject.settings.redis.cache_url}
    given = {variable: url.get_secret_value() for variable, url in urls.items() if url is not None}
    return encryption.redis({variable: connect_redis(url, _SOCKET_SECONDS) for variable, url in given.items()})


def append_only(info: dict[str, Any]) -> Finding:
    if info.get("aof_enabled"):
        return ok("redis.append_only", "appendonly yes")
    return warning(
        "redis.append_only",
        "appendonly no: a restart empties the queues",
        "Set `appendonly yes`. The relay sends again what was lost, which takes it a while after every restart.",
    )


def eviction(info: dict[str, Any]) -> Finding:
    policy = str(info.get("maxmemory_policy", "unknown"))
    if policy == "noeviction":
        return ok("redis.eviction", "maxmemory-policy noeviction")
    return error(
        "redis.eviction",
        f"maxmemory-policy {policy}: a full Redis throws messages away, without a word",
        "Set `maxmemory-policy noeviction`: a full Redis then refuses, and the relay waits.",
    )


def own_database(client: Any, subject: Subject) -> Finding:
    ours = f"{subject.settings.redis.namespace}:".encode()
    looked, foreign = 0, []
    for key in client.scan_iter(count=1_000):
        looked += 1
        if not key.startswith(ours):
            foreign.append(key)
        if looked >= _MAX_KEYS or len(foreign) >= 3:
            break
    if foreign:
        names = ", ".join(repr(key.decode(errors="replace")[:60]) for key in foreign)
        return warning(
            "redis.own_database",
            f"keys that are not ours: {names}",
            "Give Dovecote a database of its own, the number at the end of REDIS_URL: the broker may ask for all KEYS.",
        )
    return ok("redis.own_database", f"of {looked} keys looked at all are ours")


def clock(client: Any, subject: Subject) -> Finding:
    before = subject.now()
    seconds, microseconds = client.time()
    return skew("redis.clock", "Redis", seconds + microseconds / 1e6 - (before + subject.now()) / 2)
