"""Handlers of the events of verification."""

from datetime import UTC, datetime

import structlog

from domain.verification import LIFE, Challenges, CodeRejected, CodeRequested, PhoneVerified
from dovecote.unit_of_work import UnitOfWork
from workers.gateways import Gateways

log = structlog.get_logger()


def send_code(event: CodeRequested, uow: UnitOfWork, gateways: Gateways) -> None:
    """A requested code goes to the phone, as long as its challenge is open and the event is the one that issued it.

    A crash between the send and the commit sends it once more: the same code under the same idempotency
    key, so a provider that honours keys sends one message, and any other the same words twice.
    The challenge is not locked: a provider takes seconds, and an answer must not wait for it.
    Errors: UnknownCodeRequest, final at once, for an event that another writer wrote or changed.
    """
    challenge = Challenges(uow).find(event.challenge_id)
    if challenge is None or not challenge.tries_at(datetime.now(UTC)):
        log.info("code not sent: its challenge is over", challenge_id=str(event.challenge_id))
        return
    code = challenge.code_of(gateways.keys, event.event_id)
    gateways.sms.send(
        gateways.keys.decrypt(challenge.phone_ciphertext, context=str(challenge.id)),
        # The same words every time: a provider refuses a known key with another text.
        f"Your code is {code}. It works once, within {LIFE.seconds // 60} minutes of your request.",
        idempotency_key=str(event.event_id),
    )
    gateways.challenges.remember(challenge.id, challenge.tries_left, challenge.expires_at)


def update_cache(event: CodeRejected | PhoneVerified, uow: UnitOfWork, gateways: Gateways) -> None:
    """A judged answer changes how many tries are shown; Postgres says how many, whatever came meanwhile.

    A crash before the commit does it again, which changes nothing.
    """
    challenge = Challenges(uow).find(event.challenge_id)
    if challenge is None:
        gateways.challenges.forget(event.challenge_id)
    else:
        gateways.challenges.remember(challenge.id, challenge.tries_left, challenge.expires_at)
