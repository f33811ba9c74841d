"""Through a transaction-pooling proxy neither LISTEN nor session locks work; the relay finds out and says so."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dovecote.bootstrap import relay_for
from dovecote.relay.relay import NoSession
from dovecote.route import Dovecote
from dovecote.settings import Settings
from tests.conftest import settings_for
from tests.support.pooling import PGBOUNCER, pooled_url

pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed (apt-get install pgbouncer)")


@pytest.fixture
def pooled(settings: Settings, tmp_path: Path) -> Iterator[Settings]:
    """Settings that lead through a pgbouncer in transaction mode."""
    with pooled_url(settings.database.url.get_secret_value()) as url:
        yield settings_for(url, settings.redis.url.get_secret_value(), tmp_path)


def test_a_relay_behind_a_transaction_pool_says_what_is_wrong(pooled: Settings) -> None:
    with pytest.raises(NoSession, match="a proxy that pools transactions"):
        relay_for(pooled, Dovecote(routes=())).run()
