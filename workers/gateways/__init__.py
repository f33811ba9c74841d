"""The outside world, as handlers see it: one object with a client for each part of it."""

from collections.abc import Mapping
from typing import Any

from dovecote.broker.redis_client import connect_redis
from dovecote.errors import GatewayUnavailable, NoKeys
from dovecote.privacy import Keyring
from dovecote.settings import Settings
from workers.gateways.challenge_cache import ChallengeCache
from workers.gateways.sms import ConsoleSms, SmsGateway

__all__ = ["ChallengeCache", "ConsoleSms", "GatewayUnavailable", "Gateways", "NoKeys", "SmsGateway", "gateways_for"]


class Gateways:
    """What a handler may reach beyond its transaction, and the keys it needs for that.

    `keyring` is None in a process that was given no keys.
    """

    def __init__(self, *, sms: SmsGateway, challenges: ChallengeCache, keys: Keyring | None) -> None:
        self.sms = sms
        self.challenges = challenges
        self.keyring = keys

    @property
    def keys(self) -> Keyring:
        """Return the keys.

        Errors: NoKeys.
        """
        if self.keyring is None:
            raise NoKeys("this process was given no keys: set those of DOVECOTE_PRIVACY, and needs_keys at the route")
        return self.keyring


def gateways_for(settings: Settings) -> Gateways:
    """Return the clients of the outside world."""
    cache_url = settings.redis.cache_url
    cache = connect_redis(cache_url.get_secret_value(), 1.0) if cache_url else _next_database(settings)
    return Gateways(
        sms=ConsoleSms(settings.sms.handset_path, failure_rate=settings.sms.failure_rate),
        challenges=ChallengeCache(cache, settings.redis.namespace),
        keys=settings.keyring_if_given(),
    )


def _next_database(settings: Settings) -> Any:
    client = connect_redis(settings.redis.url.get_secret_value(), 1.0)
    options: Mapping[str, Any] = client.connection_pool.connection_kwargs
    client.connection_pool.connection_kwargs = {**options, "db": int(options.get("db") or 0) + 1}
    return client
