"""The proxy breaks connections as it says, or tests that lean on it would show nothing."""

import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest

from tests.support.processes import eventually
from tests.support.proxy import Proxy, Way


class Echo(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.server.heard.append(line)  # type: ignore[attr-defined]  # the server below has it
            self.wfile.write(line)


class EchoServer(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Echo)
        self.heard: list[bytes] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def port(self) -> int:
        port: int = self.server_address[1]
        return port


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    with EchoServer() as server:
        yield server
        server.shutdown()


@pytest.fixture
def proxy(echo: EchoServer) -> Iterator[Proxy]:
    with Proxy(echo.port) as proxy:
        yield proxy


class Client:
    def __init__(self, proxy: Proxy, timeout: float = 5) -> None:
        self._socket = socket.create_connection(("127.0.0.1", proxy.port), timeout)

    def ask(self, line: bytes) -> bytes:
        self._socket.sendall(line)
        return self.hear()

    def hear(self) -> bytes:
        return self._socket.recv(100)

    def set_timeout(self, seconds: float) -> None:
        self._socket.settimeout(seconds)


def test_it_passes_everything_on(proxy: Proxy) -> None:
    assert Client(proxy).ask(b"hello\n") == b"hello\n"
    assert proxy.accepted == 1


def test_a_cut_resets_what_is_there_and_takes_what_comes(proxy: Proxy) -> None:
    client = Client(proxy)
    client.ask(b"hello\n")

    proxy.cut()

    with pytest.raises(ConnectionResetError):
        client.hear()
    assert Client(proxy).ask(b"again\n") == b"again\n"


def test_it_refuses_and_keeps_its_port(proxy: Proxy) -> None:
    client = Client(proxy)
    client.ask(b"hello\n")

    proxy.refuse()

    with pytest.raises(ConnectionResetError):
        client.hear()
    with pytest.raises(ConnectionRefusedError):
        Client(proxy)
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", proxy.port))
    proxy.heal()
    assert Client(proxy).ask(b"again\n") == b"again\n"


@pytest.mark.parametrize("way", [Way.UP, Way.DOWN, Way.BOTH])
def test_a_stalled_proxy_lets_nothing_out_until_it_is_healed(proxy: Proxy, echo: EchoServer, way: Way) -> None:
    client = Client(proxy)
    client.ask(b"hello\n")
    proxy.stall(way)

    client.set_timeout(0.1)
    with pytest.raises(TimeoutError):
        client.ask(b"lost?\n")
    client.set_timeout(5)

    assert (b"lost?\n" in echo.heard) == (way is Way.DOWN)
    proxy.heal()
    assert client.hear() == b"lost?\n"


def test_a_delay_holds_up_each_way(proxy: Proxy) -> None:
    client = Client(proxy)
    proxy.delay(0.15)

    client.set_timeout(0.25)
    with pytest.raises(TimeoutError):
        client.ask(b"slow\n")
    client.set_timeout(5)

    assert client.hear() == b"slow\n"


def test_a_lost_reply_is_lost_after_the_server_has_acted(proxy: Proxy, echo: EchoServer) -> None:
    client = Client(proxy)
    proxy.lose_replies(b"COMMIT")
    assert client.ask(b"BEGIN\n") == b"BEGIN\n"

    with pytest.raises(ConnectionResetError):
        client.ask(b"COMMIT\n")

    assert echo.heard == [b"BEGIN\n", b"COMMIT\n"]
    assert proxy.lost == 1
    assert Client(proxy).ask(b"COMMIT\n") == b"COMMIT\n", "only one was to be lost"


def test_it_leads_elsewhere_after_a_failover(proxy: Proxy) -> None:
    client = Client(proxy)
    client.ask(b"hello\n")
    with EchoServer() as other:
        proxy.lead_to(other.port)

        with pytest.raises(ConnectionResetError):
            client.hear()
        assert Client(proxy).ask(b"you\n") == b"you\n"
        assert other.heard == [b"you\n"]
        other.shutdown()


def test_a_dead_server_is_a_reset(proxy: Proxy, echo: EchoServer) -> None:
    echo.shutdown()
    echo.server_close()

    with pytest.raises(ConnectionResetError):
        Client(proxy).ask(b"anybody?\n")
    eventually(lambda: proxy.links == 0, 5, "no link left")
