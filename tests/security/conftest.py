"""A database with a login for each role, and one where a writer has laid traps."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain

import psycopg
import pytest
from sqlalchemy import make_url

from tests.security.traps import one, session, traps_in
from tests.support.logins import logins


@pytest.fixture(scope="module")
def urls(database_url: str) -> Iterator[Mapping[str, str]]:
    """URLs of the module's database, by role; `owner` is a superuser."""
    with logins(database_url) as urls:
        yield urls


@pytest.fixture(scope="module")
def with_traps(urls: Mapping[str, str]) -> Mapping[str, str]:
    """The writer's traps lie in its own schema, and in public, where it may create something, as up to Postgres 14."""
    with session(urls["owner"]) as owner:
        writer = make_url(urls["writer"]).username
        owner.execute(f'grant create on schema public to "{writer}"; grant usage on schema shop to public')
        one(owner, "select dovecote.append_event('order', '1', 'shop.order_placed.v1', '{}')")
    with session(urls["writer"]) as writer_session:
        for statement in chain(traps_in("shop"), traps_in("public")):
            with suppress(psycopg.errors.UndefinedObject):
                writer_session.execute(statement)
    return urls
