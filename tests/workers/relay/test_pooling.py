"""Through a transaction-pooling proxy neither LISTEN nor session locks work; the relay finds out and says so."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import settings_for
from tests.pooling import PGBOUNCER, pooled_url
from workers.bootstrap import relay_for
from workers.relay.relay import NoSession
from workers.settings import Settings

pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed (apt-get install pgbouncer)")


@pytest.fixture
def pooled(settings: Settings, tmp_path: Path) -> Iterator[Settings]:
    """Settings that lead through a pgbouncer in transaction mode."""
    with pooled_url(settings.database.url.get_secret_value()) as url:
        yield settings_for(url, settings.redis.url.get_secret_value(), tmp_path)


def test_a_relay_behind_a_transaction_pool_says_what_is_wrong(pooled: Settings) -> None:
    with pytest.raises(NoSession, match="a proxy that pools transactions"):
        relay_for(pooled).run()
