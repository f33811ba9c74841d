"""Which event goes to which handler, over which queue, in what bundles. Read this first.

To add a handler: write one function in `workers/handlers/` and one `Route` here. The name of a handler
is written into `processed_events`: it never changes, or everything would be new to it.
"""

from domain import billing, pricing, verification
from dovecote.route import Route
from workers.handlers import billing as on_billing
from workers.handlers import pricing as on_pricing
from workers.handlers import verification as on_verification

ROUTES: tuple[Route, ...] = (
    Route(
        handler="billing.write_history",
        events=(
            billing.MembershipStarted,
            billing.MembershipActivated,
            billing.MembershipRenewed,
            billing.TierChanged,
            billing.MembershipCancelled,
            billing.MembershipExpired,
            billing.PaymentRecorded,
            billing.PaymentRefunded,
        ),
        function=on_billing.write_history,
        queue="billing",
        ordered=True,
        replayable=True,
        replay_note="a line that is there stays as it is, one that is missing is written",
    ),
    Route(
        handler="verification.send_code",
        events=(verification.CodeRequested,),
        function=on_verification.send_code,
        queue="verification",
        # A code lives five minutes: small bundles send at once, short pauses keep a retry useful.
        bundle_size=10,
        max_attempts=6,
        backoff_seconds=1.0,
        max_backoff_seconds=30.0,
        replay_note="the code was not requested a second time",
        needs_keys=True,
    ),
    Route(
        handler="verification.update_cache",
        events=(verification.CodeRejected, verification.PhoneVerified),
        function=on_verification.update_cache,
        queue="verification",
        replayable=True,
        replay_note="what the cache shows is read from Postgres anew",
    ),
    Route(
        handler="pricing.apply_quotes",
        events=(pricing.PriceQuoted,),
        function=on_pricing.apply_quotes,
        queue="pricing",
        bulk=True,
        replayable=True,
        replay_note="an older quote never replaces a newer one",
    ),
)
