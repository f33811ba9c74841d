"""The outside world of the consumers: text messages, and a cache that may vanish at any time."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import repeat
from pathlib import Path
from uuid import UUID

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from structlog.testing import capture_logs

from domain.verification import answer_challenge, request_code
from dovecote.database import Sessions
from dovecote.events.ids import uuid7
from dovecote.privacy import Keyring
from dovecote.unit_of_work import unit_of_work
from tests.conftest import Servers
from tests.support.phone_numbers import a_mobile
from workers.gateways import ChallengeCache, ConsoleSms, Gateways, GatewayUnavailable
from workers.gateways.challenge_cache import remaining_tries

PHONE = "+4915112345678"
KEYS = Keyring(hash_key=b"h" * 32, encryption_keys={"k1": b"e" * 32}, current="k1", code_key=b"c" * 32)


@pytest.fixture
def handset(tmp_path: Path) -> Path:
    return tmp_path / "handset"


def in_minutes(minutes: float) -> datetime:
    return datetime.now(UTC) + timedelta(minutes=minutes)


# Text messages --------------------------------------------------------------------------------


def test_a_message_shows_on_the_handset(handset: Path) -> None:
    sms = ConsoleSms(handset)

    sms.send(PHONE, "Your code is 123456.", idempotency_key="a")
    sms.send(PHONE, "Two\nlines", idempotency_key="b")

    first, second = handset.read_text().splitlines()
    assert first.endswith(f"  {PHONE}  Your code is 123456.")
    assert second.endswith("Two lines")
    assert sms.sent == 2


@pytest.mark.parametrize("mode_before", [None, 0o644])
def test_only_its_owner_can_read_the_handset(handset: Path, mode_before: int | None) -> None:
    if mode_before is not None:
        handset.touch(mode_before)

    ConsoleSms(handset).send(PHONE, "text", idempotency_key="a")

    assert handset.stat().st_mode & 0o777 == 0o600


def test_the_log_shows_four_digits_and_no_text(handset: Path) -> None:
    with capture_logs() as logged:
        ConsoleSms(handset).send(PHONE, "Your code is 123456.", idempotency_key="a")

    assert logged == [{"event": "sms sent", "to": "••••5678", "log_level": "info"}]


def test_without_a_handset_messages_are_counted_and_gone(
    capfd: pytest.CaptureFixture[str],
) -> None:
    sms = ConsoleSms()

    sms.send(PHONE, "Your code is 123456.", idempotency_key="a")

    assert sms.sent == 1
    assert PHONE not in "".join(capfd.readouterr())


def test_the_same_key_twice_is_one_message(handset: Path) -> None:
    sms = ConsoleSms(handset)

    for _ in range(2):
        sms.send(PHONE, "text", idempotency_key="a")

    assert sms.sent == len(handset.read_text().splitlines()) == 1


def test_the_last_ten_thousand_keys_are_remembered() -> None:
    sms = ConsoleSms()
    for number in range(10_001):
        sms.send(PHONE, "text", idempotency_key=str(number))

    sms.send(PHONE, "text", idempotency_key="1")
    assert sms.sent == 10_001

    sms.send(PHONE, "text", idempotency_key="0")
    assert sms.sent == 10_002


def test_injected_failures_come_in_their_order_and_end(handset: Path) -> None:
    sms = ConsoleSms(handset, failures=iter([True, False, True]))

    for key in ("a", "c"):
        with pytest.raises(GatewayUnavailable) as failure:
            sms.send(PHONE, "text", idempotency_key=key)
        assert PHONE not in str(failure.value)
        sms.send(PHONE, "text", idempotency_key=f"{key} again")
    sms.send(PHONE, "text", idempotency_key="d")

    assert sms.sent == 3


def test_a_failed_message_can_be_sent_again_under_its_key() -> None:
    sms = ConsoleSms(failures=iter([True]))
    with pytest.raises(GatewayUnavailable):
        sms.send(PHONE, "text", idempotency_key="a")

    sms.send(PHONE, "text", idempotency_key="a")

    assert sms.sent == 1


def test_a_failure_rate_of_one_fails_always_and_of_zero_never() -> None:
    failing, working = ConsoleSms(failure_rate=1.0), ConsoleSms(failure_rate=0.0)

    for number in range(100):
        with pytest.raises(GatewayUnavailable):
            failing.send(PHONE, "text", idempotency_key=str(number))
        working.send(PHONE, "text", idempotency_key=str(number))

    assert (failing.sent, working.sent) == (0, 100)


def test_a_handset_that_cannot_be_written_is_a_gateway_that_does_not_answer(tmp_path: Path) -> None:
    sms = ConsoleSms(tmp_path)

    with pytest.raises(GatewayUnavailable, match="Is a directory"):
        sms.send(PHONE, "text", idempotency_key="a")

    assert sms.sent == 0


def test_a_handset_that_leads_elsewhere_is_not_followed(tmp_path: Path, handset: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    handset.symlink_to(elsewhere)

    with pytest.raises(GatewayUnavailable):
        ConsoleSms(handset).send(PHONE, "text", idempotency_key="a")

    assert not elsewhere.exists()


def test_many_threads_send_each_message_once(handset: Path) -> None:
    sms = ConsoleSms(handset, failures=repeat(False))

    with ThreadPoolExecutor(16) as threads:
        list(
            threads.map(
                lambda number: sms.send(PHONE, f"text {number % 200}", idempotency_key=str(number % 200)),
                range(1_000),
            )
        )

    texts = [line.rpartition("  ")[2] for line in handset.read_text().splitlines()]
    assert sms.sent == 200
    assert sorted(texts) == sorted(f"text {number}" for number in range(200))


# The cache ------------------------------------------------------------------------------------


@pytest.fixture
def redis_client(servers: Servers) -> Iterator[Redis]:
    with Redis.from_url(servers.redis_url) as client:
        yield client


@pytest.fixture
def namespace() -> str:
    return f"test-{uuid7()}"


@pytest.fixture
def cache(redis_client: Redis, namespace: str) -> ChallengeCache:
    return ChallengeCache(redis_client, namespace)


def a_dead_client() -> Redis:
    return Redis(port=1, socket_connect_timeout=0.2, retry=Retry(NoBackoff(), 0))


@pytest.mark.servers
class TestWithRedis:
    def test_what_is_remembered_is_known_until_it_is_forgotten(self, cache: ChallengeCache) -> None:
        challenge_id = uuid7()

        cache.remember(challenge_id, 3, in_minutes(5))
        assert cache.tries_left(challenge_id) == 3

        cache.forget(challenge_id)
        assert cache.tries_left(challenge_id) is None

    def test_nothing_is_known_of_other_challenges(self, cache: ChallengeCache) -> None:
        cache.remember(uuid7(), 3, in_minutes(5))

        assert cache.tries_left(uuid7()) is None

    def test_a_client_that_decodes_is_as_good(self, servers: Servers, namespace: str) -> None:
        cache = ChallengeCache(Redis.from_url(servers.redis_url, decode_responses=True), namespace)
        challenge_id = uuid7()

        cache.remember(challenge_id, 2, in_minutes(5))

        assert cache.tries_left(challenge_id) == 2

    @pytest.mark.parametrize("decodes", [False, True])
    @pytest.mark.parametrize("planted", [b"", b"-1", b"2.5", b"9" * 5_000, b"\xff\xfe", "²".encode()])
    def test_what_others_have_written_is_no_number_and_no_error(
        self, servers: Servers, redis_client: Redis, namespace: str, planted: bytes, decodes: bool
    ) -> None:
        challenge_id = uuid7()
        redis_client.set(f"{namespace}:challenge:{challenge_id}", planted)

        cache = ChallengeCache(Redis.from_url(servers.redis_url, decode_responses=decodes), namespace)

        assert cache.tries_left(challenge_id) is None

    def test_keys_live_in_their_namespace_and_as_long_as_the_challenge(
        self, cache: ChallengeCache, redis_client: Redis, namespace: str
    ) -> None:
        challenge_id = uuid7()

        cache.remember(challenge_id, 3, in_minutes(5))

        key = f"{namespace}:challenge:{challenge_id}"
        assert redis_client.keys(f"{namespace}*") == [key.encode()]
        milliseconds_left = redis_client.pttl(key)
        assert 290_000 < milliseconds_left <= 300_000

    def test_an_expired_challenge_is_not_kept(self, cache: ChallengeCache) -> None:
        challenge_id = uuid7()

        cache.remember(challenge_id, 3, in_minutes(-1))

        assert cache.tries_left(challenge_id) is None

    def test_a_number_that_comes_late_does_not_replace_a_lower_one(self, cache: ChallengeCache) -> None:
        challenge_id = uuid7()

        for tries_left in (2, 3, 1, 2):
            cache.remember(challenge_id, tries_left, in_minutes(5))

        assert cache.tries_left(challenge_id) == 1

    def test_a_redis_that_was_wiped_and_lost_its_scripts_is_simply_filled_again(
        self, cache: ChallengeCache, redis_client: Redis, namespace: str
    ) -> None:
        challenge_id = uuid7()
        cache.remember(challenge_id, 3, in_minutes(5))
        redis_client.delete(f"{namespace}:challenge:{challenge_id}")
        redis_client.script_flush()

        assert cache.tries_left(challenge_id) is None
        cache.remember(challenge_id, 3, in_minutes(5))
        assert cache.tries_left(challenge_id) == 3

    def test_tries_are_shown_from_the_cache(self, cache: ChallengeCache, sessions: Sessions) -> None:
        challenge_id = a_request(sessions)
        cache.remember(challenge_id, 1, in_minutes(5))

        assert shown(sessions, cache, challenge_id) == 1

    def test_a_miss_is_answered_by_postgres_and_remembered(self, cache: ChallengeCache, sessions: Sessions) -> None:
        user = f"user-{uuid7()}"
        challenge_id = a_request(sessions, user)
        with unit_of_work(sessions) as uow:
            answer_challenge(uow, KEYS, challenge_id, "000000", datetime.now(UTC), user_id=user)

        assert shown(sessions, cache, challenge_id) == 2
        assert cache.tries_left(challenge_id) == 2

    def test_what_is_not_there_is_not_remembered(self, cache: ChallengeCache, sessions: Sessions) -> None:
        challenge_id = uuid7()

        assert shown(sessions, cache, challenge_id) == 0
        assert cache.tries_left(challenge_id) is None


@pytest.mark.parametrize(
    "action",
    [
        lambda cache, id: cache.remember(id, 3, in_minutes(5)),
        lambda cache, id: cache.tries_left(id),
        lambda cache, id: cache.forget(id),
    ],
    ids=["remember", "tries_left", "forget"],
)
def test_a_redis_that_is_gone_costs_one_warning_and_no_error(
    action: Callable[[ChallengeCache, UUID], int | None],
) -> None:
    challenge_id = uuid7()

    with capture_logs() as logged:
        answer = action(ChallengeCache(a_dead_client(), "test"), challenge_id)

    (warning,) = logged
    assert answer is None
    assert (warning["log_level"], warning["challenge_id"]) == ("warning", str(challenge_id))


def test_a_cache_without_a_client_knows_nothing_and_says_nothing() -> None:
    cache, challenge_id = ChallengeCache(None, "test"), uuid7()

    with capture_logs() as logged:
        cache.remember(challenge_id, 3, in_minutes(5))
        cache.forget(challenge_id)

    assert cache.tries_left(challenge_id) is None
    assert logged == []


@pytest.mark.servers
@pytest.mark.parametrize("client", [None, a_dead_client()], ids=["no Redis", "a dead Redis"])
def test_tries_are_shown_without_redis(sessions: Sessions, client: Redis | None) -> None:
    challenge_id = a_request(sessions)

    assert shown(sessions, ChallengeCache(client, "test"), challenge_id) == 3


def test_gateways_show_no_key() -> None:
    gateways = Gateways(sms=ConsoleSms(), challenges=ChallengeCache(None, "test"), keys=KEYS)

    assert "hhh" not in repr(gateways)


def a_request(sessions: Sessions, user: str | None = None) -> UUID:
    with unit_of_work(sessions) as uow:
        return request_code(uow, KEYS, user or f"user-{uuid7()}", a_mobile(), datetime.now(UTC)).id


def shown(sessions: Sessions, cache: ChallengeCache, challenge_id: UUID) -> int:
    with unit_of_work(sessions) as uow:
        return remaining_tries(uow, cache, challenge_id, datetime.now(UTC))
