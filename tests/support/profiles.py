"""How long Hypothesis looks: a little in every run, a long time with HYPOTHESIS_PROFILE=thorough."""

import os

from hypothesis import HealthCheck, settings

# Real servers on a loaded machine keep no deadline, and their fixtures are cleaned by the tests themselves.
_ON_SERVERS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
settings.register_profile("dovecote", deadline=None, suppress_health_check=_ON_SERVERS)
settings.register_profile("thorough", deadline=None, suppress_health_check=_ON_SERVERS, max_examples=5_000)

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
settings.load_profile("thorough" if THOROUGH else "dovecote")


def examples(few: int, many: int | None = None) -> int:
    """Return how many cases to try: `few`, or with the thorough profile `many` (by default 20 times as many)."""
    return (many or 20 * few) if THOROUGH else few
