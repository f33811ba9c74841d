"""A bundle: what a consumer acts on in one transaction."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from dovecote.envelope import Envelope
from dovecote.route import Route
from dovecote.store.poison import PoisonMessage


@dataclass(frozen=True)
class Bundle:
    """Events of one message for one handler.

    retry   the message was sent for deliveries that are due: only those still due are taken
    replay  the replay that has the handler act again on what it has acted on, once
    sent_in the run of Postgres in which the relay has read them, by dovecote.outbox_run(); None where the message does
            not say
    poison  the message they came in, where it was in flight in a process that died
    """

    route: Route
    envelopes: Sequence[Envelope]
    retry: bool = False
    replay: UUID | None = None
    sent_in: str | None = None
    poison: PoisonMessage | None = None

    def of(self, envelopes: Sequence[Envelope]) -> "Bundle":
        """Return the same bundle with these of its events only."""
        return replace(self, envelopes=envelopes)
