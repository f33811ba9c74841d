"""One way to connect to Redis.

Every redis.RedisError is transient: the server is unreachable, slow, loading, full, a replica, out of disk, or wants
another password. It ends once somebody has seen to the server, so what waits for it is kept meanwhile.
"""

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

#: Of one process. It uses one for each queue and delay queue that it waits on, and one for each thread that
#: acknowledges. Without a limit a process of many threads could use up all connections of the server.
MAX_CONNECTIONS = 64


def is_wrong_type(error: BaseException) -> bool:
    """Return whether a key of ours has another type than ours, which does not end by itself (Publisher.mend)."""
    return isinstance(error, redis.ResponseError) and "WRONGTYPE" in str(error)


def connect_redis(url: str, socket_timeout_seconds: float, max_connections: int = MAX_CONNECTIONS) -> redis.Redis:
    """Return a client that never repeats a command by itself: a lost reply may have been a fetch.

    Blocks for up to `socket_timeout_seconds` when the pool is exhausted.
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
