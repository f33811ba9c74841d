"""One small HTTP server a process, in a daemon thread: a few pages by GET, and nothing is logged of it.

A port that is taken is tried again every second, and the process goes on meanwhile. That is how the worker
processes of one Dramatiq master share a port: the one that binds it serves for all of them, and when it dies another
one gets it.

Strangers may ask, so nothing they do takes a thread or stays: one thread holds all connections, a bounded number, and
closes the one that has dawdled longest when there are more. A page is made once for all who wait for it.
"""

import errno
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import NamedTuple

import structlog

log = structlog.get_logger()

_RETRY_SECONDS = 1.0
#: Longest life of a connection, from its first byte to the last of the answer.
DEADLINE_SECONDS = 10.0
MAX_CONNECTIONS = 128
MAX_REQUEST_BYTES = 8_192
_CHUNK_BYTES = 65_536
_TEXT = "text/plain; charset=utf-8"


class Page(NamedTuple):
    """What a GET is answered with."""

    status: int
    content_type: str
    body: bytes


Pages = Mapping[str, Callable[[], Page]]


def serve(host: str, port: int, pages: Pages) -> None:
    """Answer GET for these paths from now on until the process ends. Returns at once."""
    threading.Thread(target=_serve, args=(host, port, pages), name="metrics", daemon=True).start()


def _serve(host: str, port: int, pages: Pages) -> None:
    is_logged = False
    while True:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server(
                (host, port),
                family=family,
                backlog=MAX_CONNECTIONS,
                dualstack_ipv6=family == socket.AF_INET6 and socket.has_dualstack_ipv6(),
            )
        except OSError as error:
            if error.errno != errno.EADDRINUSE and not is_logged:
                is_logged = True
                log.warning("metrics and health cannot be served", host=host, port=port, error=str(error))
            time.sleep(_RETRY_SECONDS)  # nothing notifies of a freed port
            continue
        _Server(listener, pages).run()


class _Connection:
    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self.ends_at = time.monotonic() + DEADLINE_SECONDS
        self.heard = b""
        self.to_say = memoryview(b"")
        self.is_head = False
        self.waits = False


class _Server:
    """All connections of one port, in one thread."""

    def __init__(self, listener: socket.socket, pages: Pages) -> None:
        self._pages = pages
        self._selector = selectors.DefaultSelector()
        self._listener = listener
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        # The oldest first.
        self._connections: dict[int, _Connection] = {}
        self._waiting: dict[str, list[_Connection]] = {}
        self._being_made: set[str] = set()
        self._made: deque[tuple[str, Page]] = deque()
        self._wakes, self._wake = socket.socketpair()
        for end in (self._wakes, self._wake):
            end.setblocking(False)
        self._selector.register(self._wakes, selectors.EVENT_READ)

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select(self._seconds_to_next_end()):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._wakes:
                    with suppress(BlockingIOError):
                        self._wakes.recv(_CHUNK_BYTES)
                elif id(key.data) in self._connections:  # not closed in this very turn
                    self._go_on(key.data)
            self._answer_what_is_made()
            now = time.monotonic()
            for connection in [one for one in self._connections.values() if one.ends_at <= now]:
                self._close(connection)

    def _seconds_to_next_end(self) -> float | None:
        oldest = next(iter(self._connections.values()), None)
        return None if oldest is None else max(0.0, oldest.ends_at - time.monotonic())

    def _accept(self) -> None:
        try:
            stream, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                time.sleep(0.1)  # the process has no descriptor left, which is no reason to spin
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            # Not one that has asked and waits for us.
            dawdling = next((one for one in self._connections.values() if not one.waits), None)
            if dawdling is None:
                stream.close()
                return
            self._close(dawdling)
        stream.setblocking(False)
        connection = _Connection(stream)
        self._connections[id(connection)] = connection
        self._selector.register(stream, selectors.EVENT_READ, connection)
        self._go_on(connection)  # who is quick is not overtaken by those who dawdle

    def _go_on(self, connection: _Connection) -> None:
        try:
            if connection.to_say:
                self._say(connection)
            else:
                self._hear(connection)
        except BlockingIOError:
            pass
        except OSError:
            self._close(connection)

    def _hear(self, connection: _Connection) -> None:
        heard = connection.stream.recv(MAX_REQUEST_BYTES)
        connection.heard += heard
        head, end, _ = connection.heard.replace(b"\r\n", b"\n").partition(b"\n\n")
        if end:
            # Read no more: what else arrives would only wake us.
            self._selector.unregister(connection.stream)
            self._look_for(connection, head.split(b"\n")[0])
        elif len(connection.heard) > MAX_REQUEST_BYTES:
            self._selector.unregister(connection.stream)
            self._answer(connection, _sorry(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE))
        elif not heard:
            self._close(connection)

    def _look_for(self, connection: _Connection, line: bytes) -> None:
        words = line.decode("latin-1").split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            self._answer(connection, _sorry(HTTPStatus.BAD_REQUEST))
            return
        method, path = words[0], words[1].partition("?")[0]
        connection.is_head = method == "HEAD"
        if method not in ("GET", "HEAD"):
            self._answer(connection, _sorry(HTTPStatus.METHOD_NOT_ALLOWED))
        elif path not in self._pages:
            self._answer(connection, Page(404, _TEXT, b"there is no such page\n"))
        else:
            connection.waits = True
            self._waiting.setdefault(path, []).append(connection)
            if len(self._waiting[path]) > 1 or path in self._being_made:
                return
            self._being_made.add(path)
            # A daemon, one for each page at most: a page that takes long holds up neither the others nor our end.
            threading.Thread(target=self._make, args=(path,), name="metrics page", daemon=True).start()

    def _make(self, path: str) -> None:
        self._made.append((path, _made(self._pages[path])))
        with suppress(BlockingIOError):  # then it is awake
            self._wake.send(b".")

    def _answer_what_is_made(self) -> None:
        while self._made:
            path, page = self._made.popleft()
            self._being_made.discard(path)
            for connection in self._waiting.pop(path, []):
                self._answer(connection, page)

    def _answer(self, connection: _Connection, page: Page) -> None:
        head = f"HTTP/1.1 {page.status} {HTTPStatus(page.status).phrase}\r\nContent-Type: {page.content_type}\r\n"
        head += f"Content-Length: {len(page.body)}\r\nConnection: close\r\n"
        head += "Allow: GET, HEAD\r\n\r\n" if page.status == HTTPStatus.METHOD_NOT_ALLOWED else "\r\n"
        connection.waits = False
        connection.to_say = memoryview(head.encode() + (b"" if connection.is_head else page.body))
        self._selector.register(connection.stream, selectors.EVENT_WRITE, connection)
        self._go_on(connection)

    def _say(self, connection: _Connection) -> None:
        connection.to_say = connection.to_say[connection.stream.send(connection.to_say[:_CHUNK_BYTES]) :]
        if not connection.to_say:
            self._close(connection)

    def _close(self, connection: _Connection) -> None:
        del self._connections[id(connection)]
        for waiting in self._waiting.values():
            if connection in waiting:
                waiting.remove(connection)
        with suppress(KeyError):  # it waits for its page
            self._selector.unregister(connection.stream)
        connection.stream.close()


def _sorry(status: HTTPStatus) -> Page:
    return Page(status, _TEXT, f"{status.phrase}\n".encode())


def _made(page: Callable[[], Page]) -> Page:
    try:
        return page()
    except Exception:
        log.exception("a page could not be made")
        return Page(500, _TEXT, b"this page could not be made; the log says why\n")
