"""The outside world, as consumers see it: one object with a client for each part of it."""

from dataclasses import dataclass

from domain.privacy import Keyring
from workers.gateways.challenge_cache import ChallengeCache
from workers.gateways.errors import GatewayUnavailable
from workers.gateways.sms import ConsoleSms, SmsGateway

__all__ = ["ChallengeCache", "ConsoleSms", "GatewayUnavailable", "Gateways", "SmsGateway"]


@dataclass(frozen=True)
class Gateways:
    """What a consumer may reach beyond its transaction, and the keys it needs for that."""

    sms: SmsGateway
    challenges: ChallengeCache
    keys: Keyring
