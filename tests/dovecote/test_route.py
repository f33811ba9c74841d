"""A route that could never act is refused when it is made, in words that say what to do."""

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from domain.pricing import PriceQuoted
from dovecote.bootstrap import broker_for, declare_handlers
from dovecote.consumer.consumer import Consumer
from dovecote.relay.bundler import Bundler, bundle
from dovecote.route import InvalidRoute, Route, distinct
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route
from workers.gateways import gateways_for
from workers.routes import ROUTES

ENVELOPE = b'{"specversion":"1.0","id":"01890a5d-ac96-774b-bcce-b302099a8057"}'


def act(_event: Any, _uow: Any, _gateways: Any) -> None: ...


async def act_async(_event: Any, _uow: Any, _gateways: Any) -> None: ...


async def yields_async(_event: Any, _uow: Any, _gateways: Any) -> AsyncIterator[int]:
    yield 1


def yields(_event: Any, _uow: Any, _gateways: Any) -> Iterator[int]:
    yield 1


def timed(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*arguments: Any) -> Any:
        return function(*arguments)

    return wrapper


class Async:
    async def __call__(self, _event: Any, _uow: Any, _gateways: Any) -> None: ...

    async def method(self, _event: Any, _uow: Any, _gateways: Any) -> None: ...

    @classmethod
    async def of_class(cls, _event: Any, _uow: Any, _gateways: Any) -> None: ...

    @staticmethod
    async def static(_event: Any, _uow: Any, _gateways: Any) -> None: ...


class Good:
    def __call__(self, _event: Any, _uow: Any, _gateways: Any) -> None: ...

    def method(self, _event: Any, _uow: Any, _gateways: Any) -> None: ...


def takes_two(_event: Any, _uow: Any) -> None: ...


def takes_four(_event: Any, _uow: Any, _gateways: Any, _more: Any) -> None: ...


def wants_a_name(_event: Any, _uow: Any, _gateways: Any, *, name: str) -> None: ...


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (act_async, "make it a `def`, and run what must be awaited with asyncio.run"),
        (functools.partial(act_async), "asyncio.run"),
        (functools.partial(functools.partial(Async().method)), "asyncio.run"),
        (Async(), "asyncio.run"),
        (Async().method, "asyncio.run"),
        (Async.of_class, "asyncio.run"),
        (Async.static, "asyncio.run"),
        (timed(act_async), "asyncio.run"),
        (timed(timed(Async().method)), "asyncio.run"),
        (timed(functools.partial(Async())), "asyncio.run"),
        (yields_async, "asyncio.run"),
        (yields, "make it a function without `yield`"),
        (timed(functools.partial(yields)), "without `yield`"),
        (Good, "is the class Good"),
        (None, "cannot be called"),
        ("tests.function", "cannot be called"),
        (Good(), None),
        (Good().method, None),
        (functools.partial(wants_a_name, name="x"), None),
        (functools.partial(takes_four, None), None),
        (lambda *_: None, None),
        (timed(act), None),
        (takes_two, "called with three arguments"),
        (takes_four, "called with three arguments"),
        (wants_a_name, "called with three arguments"),
        (lambda: None, "called with three arguments"),
    ],
)
def test_a_route_takes_what_acts_when_it_is_called_and_nothing_else(given: Any, words: str | None) -> None:
    def make() -> Route:
        return Route(handler="test.h", events=(PriceQuoted,), function=given, queue="q")

    if words is None:
        assert make().function is given
        return
    with pytest.raises(InvalidRoute, match=r"test\.h: its function") as refused:
        make()
    assert words in str(refused.value)


def test_a_wrapper_that_awaits_by_itself_can_say_so() -> None:
    def run(function: Any) -> Callable[..., None]:
        @functools.wraps(function)
        def wrapper(*arguments: Any) -> None:
            asyncio.run(function(*arguments))

        del wrapper.__wrapped__  # functools.wraps has set it
        return wrapper

    assert a_route(function=run(act_async))


@pytest.mark.parametrize(
    "name", ["", " ", "a b", 'a"b', "a\\b", "a\n", "a/b", "ä", "a\x00", "x" * 201, "a,b", "a{b}", None, 7, b"a"]
)
def test_a_name_is_a_plain_word(name: Any) -> None:
    with pytest.raises(InvalidRoute, match=r"handler .* is no plain name"):
        a_route(name)
    with pytest.raises(InvalidRoute, match=r"queue .* is no plain name"):
        a_route(queue=name)


@pytest.mark.parametrize(
    "queue",
    ["q.DQ", "q.XQ", "q.msgs", "q.in_flight", "q.XQ.msgs", "q.held.h", "__acks__.x.q", "__relay__", "1q", "q:1"],
)
def test_a_queue_has_no_name_that_another_one_s_keys_have(queue: str) -> None:
    with pytest.raises(InvalidRoute, match="queue"):
        a_route(queue=queue)


@pytest.mark.parametrize("name", ["a", "a.b-c_d:e", "x" * 200, "q.held.h", "in.c.in.bulk"])
def test_other_names_are_free(name: str) -> None:
    assert a_route(name).handler == name


@pytest.mark.parametrize(
    "more",
    [
        *({name: value} for name in ("bundle_size", "max_attempts") for value in (0, -1, 1.5, True, "3", None)),
        *(
            {name: value}
            for name in ("backoff_seconds", "max_backoff_seconds", "time_limit_seconds")
            for value in (-0.1, float("nan"), float("inf"), True, "1", None)
        ),
        {"time_limit_seconds": 0},
        {"events": PriceQuoted},
        {"events": ("pricing.price_quoted.v1",)},
    ],
)
def test_numbers_and_events_are_looked_at(more: dict[str, Any]) -> None:
    options = {"handler": "test.h", "events": (PriceQuoted,), "function": act, "queue": "q", **more}
    with pytest.raises(InvalidRoute, match=r"test\.h: "):
        Route(**options)


def test_our_own_routes_can_live_together() -> None:
    assert distinct(ROUTES) == ROUTES


def test_two_routes_of_one_handler_name_are_refused_wherever_a_system_is_put_together(
    servers: Servers, tmp_path: Path
) -> None:
    twice = [a_route("test.same", queue="one"), a_route("test.same", queue="two")]
    settings = settings_for("postgresql://nobody@127.0.0.1:1/nothing", servers.redis_url, tmp_path)
    consumer = Consumer(None, gateways_for(settings))  # type: ignore[arg-type]  # it is not reached

    with pytest.raises(InvalidRoute, match=r"more than one route has the handler name 'test\.same'"):
        distinct(twice)
    with pytest.raises(InvalidRoute, match=r"test\.same"):
        Bundler(twice)
    with pytest.raises(InvalidRoute, match=r"test\.same"):
        declare_handlers(broker_for(settings, []), consumer, twice)


def test_the_whole_name_of_a_handler_is_in_its_messages_ids() -> None:
    base = "notifications.send_the_customer_that_the_preferences_of_the_account_"
    names = [f"{base}by_mail", f"{base}by_push", base, base[:64], base[:65]]

    ids = {bundle(a_route(name), [1], [ENVELOPE]).id for name in names}

    assert len(ids) == len(names)


def test_a_short_name_s_message_keeps_its_id() -> None:
    # As it was before long names were kept distinct: a deploy must not send again what is queued.
    assert bundle(a_route("test.note"), [1, 2], [ENVELOPE]).id == "b2eb5343593708e20cb2b74a6885bf34c"


def test_every_name_that_is_taken_makes_a_message_that_can_be_read() -> None:
    sent = bundle(a_route("a.b-c_d:e" + "x" * 191, queue="q" * 200), [1], [ENVELOPE])

    assert json.loads(sent.message)["actor_name"] == sent.handler
