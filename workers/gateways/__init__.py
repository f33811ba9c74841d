"""The outside world, as consumers see it: one object with a client for each part of it."""

from dovecote.privacy import Keyring
from workers.gateways.challenge_cache import ChallengeCache
from workers.gateways.errors import GatewayUnavailable, NoKeys
from workers.gateways.sms import ConsoleSms, SmsGateway

__all__ = ["ChallengeCache", "ConsoleSms", "GatewayUnavailable", "Gateways", "NoKeys", "SmsGateway"]


class Gateways:
    """What a consumer may reach beyond its transaction, and the keys it needs for that.

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
