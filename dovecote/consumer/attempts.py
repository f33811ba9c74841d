"""What a failed attempt costs: the next one after a pause, or none."""

from dataclasses import dataclass
from datetime import timedelta

from dovecote.envelope import Envelope
from dovecote.errors import DomainError, GatewayUnavailable, UnknownEvent
from dovecote.route import Route
from dovecote.store.deliveries import FailedAttempt, SoFar
from dovecote.store.delivery_state import DeliveryState
from dovecote.telemetry.failures import Failure, KilledTheProcess, UnknownHandler, describe, is_transient


@dataclass(frozen=True)
class Attempt:
    """One attempt that failed with this error, described by `failure`."""

    envelope: Envelope
    error: BaseException
    failure: Failure

    @classmethod
    def of(cls, envelope: Envelope, error: BaseException) -> "Attempt":
        return cls(envelope, error, describe(error, envelope))

    def after(self, so_far: SoFar, route: Route) -> FailedAttempt:
        """Return what to record of this attempt, given those before it."""
        if isinstance(self.error, GatewayUnavailable | UnknownEvent | UnknownHandler) or is_transient(self.error):
            # A provider is unavailable, or code that knows the event is not deployed yet. No attempt is spent, however
            # long it takes.
            return self._failed(DeliveryState.RETRYING, so_far.attempts, route.outage_pause(so_far.age))
        attempts = so_far.attempts + 1
        if attempts >= route.max_attempts or self._is_final(route):
            return self._failed(DeliveryState.DEAD, attempts, None)
        return self._failed(DeliveryState.RETRYING, attempts, route.backoff(attempts))

    def _failed(self, state: DeliveryState, attempts: int, pause: timedelta | None) -> FailedAttempt:
        return FailedAttempt(self.envelope, self.failure, state, attempts, pause)

    def _is_final(self, route: Route) -> bool:
        if isinstance(self.error, KilledTheProcess):
            return True
        return isinstance(self.error, DomainError) and not isinstance(self.error, route.transient_errors)
