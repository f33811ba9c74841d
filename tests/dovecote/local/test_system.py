"""A system on this machine keeps its ports and its database to itself, whatever else runs here."""

import socket

import psycopg
import pytest

from dovecote.local.system import _ports
from dovecote.migrations import schema
from tests.support.logins import ROLES, logins

NAMES = ("relay", "relay-2", "pricing")


def test_ports_count_up_from_the_one_that_is_given() -> None:
    with _ports(NAMES, "127.0.0.1", 9464) as ports:
        assert ports == {"relay": 9464, "relay-2": 9465, "pricing": 9466}


def test_port_zero_turns_metrics_off() -> None:
    with _ports(NAMES, "127.0.0.1", 0) as ports:
        assert ports == {}


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])  # noqa: S104 - free ports, held for a short time
def test_a_port_is_kept_from_strangers_and_free_for_the_process_it_is_meant_for(host: str) -> None:
    with _ports(NAMES, host, None) as ports:
        port = ports["relay"]
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind((host, port))
        with socket.create_server((host, port)) as ours:
            listens_on = ours.getsockname()[1]
            with pytest.raises(OSError, match="in use"):
                socket.create_server((host, port))
        # The process is started again.
        socket.create_server((host, port)).close()

    assert len({*ports.values()}) == 3
    assert listens_on == port


def test_two_systems_have_no_port_in_common() -> None:
    many = [str(number) for number in range(200)]
    with _ports(many, "127.0.0.1", None) as one, _ports(many, "127.0.0.1", None) as other:
        assert not {*one.values()} & {*other.values()}


@pytest.mark.servers
def test_a_server_of_our_own_lets_nobody_into_the_database_without_a_role_of_ours(fresh_database_url: str) -> None:
    schema.keep_strangers_out(fresh_database_url)
    schema.keep_strangers_out(fresh_database_url)  # as at every start

    with logins(fresh_database_url) as urls:
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            psycopg.connect(urls["stranger"])
        for name, role in ROLES.items():
            if role is not None:
                psycopg.connect(urls[name]).close()
