"""No-op instrumentation of relay and consumers; exporter/metrics.py has the Prometheus one.

Those who listen are in metrics.py. They need prometheus_client, which is imported where metrics are served only.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from dovecote.envelope import Envelope

RelayState = Literal[
    "starting",
    "leading",
    "standing_by",
    "standing_back",
    "refuses",
    "sending_again",
    "waiting_for_postgres",
    "waiting_for_redis",
    "waiting_for_schema",
    "waiting_for_standby",
]


class ConsumerInstrumentation:
    """What a consumer process reports; called from all of its threads."""

    def fetching(self, queue: str) -> None:
        """The thread that fetches from this queue is alive: at least every few seconds, busy or idle."""

    def in_flight(self, handler: str, events: int) -> AbstractContextManager[None]:
        """A bundle is in flight until the end of the block."""
        return nullcontext()

    def handled(self, handler: str, times: Sequence[float]) -> None:
        """The handler was called between these values of time.monotonic(), once from each to the next."""

    def acted(self, handler: str, envelopes: Sequence[Envelope], *, again: bool) -> None:
        """The effects of these are committed; `again` says that a replay asked for it."""

    def failed(self, handler: str, state: str) -> None:
        """An event failed and is `retrying` or `dead` now."""

    def parked(self, handler: str, events: int) -> None:
        """Events wait behind an earlier one of their aggregate."""

    def refused(self, queue: str, reason: str) -> None:
        """A message was refused: no relay made it as it is."""

    def phantoms(self, handler: str, events: int) -> None:
        """Events were passed over, because they are not in the outbox."""


class RelayInstrumentation:
    """What a relay reports; called from one thread, but for `reconciled`, which is called from another."""

    def alive(self, state: RelayState) -> None:
        """One turn of its loop: at least every few seconds, but for `sending_again`, one long search."""

    def published(self, events: int) -> None:
        """A batch is recorded as published."""

    def sent(self, bundles: int) -> None:
        """Messages of batches and retries were put on their queues."""

    def retried(self, events: int) -> None:
        """Deliveries whose time had come were sent."""

    def republished(self, bundles: int) -> None:
        """Messages that Redis had lost were sent again."""

    def reconciled(self, handler: str, events: int) -> None:
        """Events were lost by their queue and sent again; 0 makes the handler known."""

    def reaped(self, messages: int) -> None:
        """Messages were requeued from dead workers."""

    def rang(self) -> None:
        """A writer woke the relay."""
