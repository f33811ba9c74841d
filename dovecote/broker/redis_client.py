"""One way to connect to Redis, and what may go wrong there without being anybody's fault."""

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

#: What Redis raises when it is away, slow, loading, full, a replica, out of disk, or wants another password.
#: All of it passes once somebody has seen to the server; what we hold is worth waiting for.
PASSING = (redis.RedisError,)


def is_wrong_type(error: BaseException) -> bool:
    """Return whether a key of ours is of another type than ours: that does not pass by itself (OutboxBroker.mend)."""
    return isinstance(error, redis.ResponseError) and "WRONGTYPE" in str(error)


#: Of one process. It uses one for each queue and delay queue it waits on, and one for each thread that
#: acknowledges; without an end, a process of many threads could use up what the server gives to all.
MAX_CONNECTIONS = 64


def connect_redis(url: str, socket_timeout_seconds: float, max_connections: int = MAX_CONNECTIONS) -> redis.Redis:
    """Return a client that never repeats a command by itself: a lost reply may have been a fetch.

    Whoever finds all connections in use waits for one, as long as for an answer.
    """
    # A socket of this machine has no network in between.
    over_network = {} if url.startswith("unix:") else {"socket_connect_timeout": 5, "socket_keepalive": True}
    pool = redis.BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=socket_timeout_seconds,
        socket_timeout=socket_timeout_seconds,
        retry=Retry(NoBackoff(), 0),
        **over_network,
    )
    return redis.Redis.from_pool(pool)
