"""A TCP proxy that breaks what runs through it, for tests: it stands between our processes and a real server.

It knows nothing of the protocols. Its port stays its own while it refuses, so nobody else can take it.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from enum import Flag, auto
from types import TracebackType
from typing import Any, Self

from sqlalchemy import make_url

_CHUNK_BYTES = 65_536
_DONE_WITHIN_SECONDS = 10


class Way(Flag):
    UP = auto()  # client to server
    DOWN = auto()  # server to client
    BOTH = UP | DOWN


@dataclass(eq=False)
class Link:
    """One connection through the proxy."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    loses_reply: bool = False


class Proxy:
    """Leads to a port of this machine until a fault is asked for; to be used from any thread.

    links     connections open now
    accepted  connections ever taken
    lost      replies thrown away so far
    """

    def __init__(self, target_port: int) -> None:
        self.accepted = self.lost = 0
        self._target_port = target_port
        self._links: set[Link] = set()
        self._delays = {Way.UP: 0.0, Way.DOWN: 0.0}
        self._open = {Way.UP: asyncio.Event(), Way.DOWN: asyncio.Event()}
        self._losing, self._losses = b"", 0
        # Bound and never listening: while we refuse, this keeps the port for us.
        self._reserve = _bound(0)
        self.port: int = self._reserve.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy {self.port}", daemon=True)
        self._thread.start()
        self.heal()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def through(self, url: str) -> str:
        """Return the URL of a server, leading through this proxy."""
        return make_url(url).set(host="127.0.0.1", port=self.port).render_as_string(hide_password=False)

    @property
    def links(self) -> int:
        return len(self._links)

    # Faults ----------------------------------------------------------------------------------

    def delay(self, seconds: float, way: Way = Way.BOTH) -> None:
        """Hold up everything that goes this way from now on."""
        self._run(self._set_delay(seconds, way))

    def stall(self, way: Way = Way.BOTH) -> None:
        """Take what comes and let nothing out, ends of connections neither; `heal` lets it all out."""
        self._run(self._shut(way))

    def cut(self) -> None:
        """Reset every connection there is; new ones are taken."""
        self._run(self._cut())

    def refuse(self) -> None:
        """Reset every connection and refuse new ones."""
        self._run(self._refuse())

    def lose_replies(self, to: bytes, times: int = 1) -> None:
        """Pass on the next requests that have these bytes, wait for the answer, and reset instead of giving it.

        The bytes must reach us in one piece; a short statement does.
        """
        self._run(self._lose(to, times))

    def lead_to(self, port: int) -> None:
        """Lead new connections to another server and reset those to the old one: a failover."""
        self._run(self._switch(port))

    def heal(self) -> None:
        """End every fault; connections that are left go on."""
        self._run(self._heal())

    def close(self) -> None:
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_DONE_WITHIN_SECONDS)
        self._loop.close()
        self._reserve.close()

    # In the loop's thread --------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_DONE_WITHIN_SECONDS)

    async def _set_delay(self, seconds: float, way: Way) -> None:
        self._delays.update(dict.fromkeys(way, seconds))

    async def _shut(self, way: Way) -> None:
        for one in way:
            self._open[one].clear()

    async def _cut(self) -> None:
        for link in self._links:
            _reset(link.client)
            _reset(link.server)
        # The sockets are closed in the loop's next round: the caller may count on it.
        await asyncio.sleep(0)

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._cut()

    async def _lose(self, to: bytes, times: int) -> None:
        self._losing, self._losses = to, times

    async def _switch(self, port: int) -> None:
        self._target_port = port
        await self._cut()

    async def _heal(self) -> None:
        self._losses = 0
        await self._set_delay(0, Way.BOTH)
        for gate in self._open.values():
            gate.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, sock=_bound(self.port))

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            _reset(to_client)
            return
        link = Link(to_client, to_server)
        self._links.add(link)
        ways = [
            asyncio.ensure_future(self._pump(Way.UP, from_client, to_server, link)),
            asyncio.ensure_future(self._pump(Way.DOWN, from_server, to_client, link)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        to_client.close()
        to_server.close()
        self._links.discard(link)
        self._ended(link)

    async def _pump(self, way: Way, source: asyncio.StreamReader, sink: asyncio.StreamWriter, link: Link) -> None:
        try:
            while data := await source.read(_CHUNK_BYTES):
                if way is Way.UP:
                    self._notice(data, link)
                else:
                    answer = self._answer(data, link)
                    if answer is None:
                        self.lost += 1
                        _reset(link.client)
                        return
                    data = answer
                if self._delays[way]:
                    await asyncio.sleep(self._delays[way])
                await self._open[way].wait()
                sink.write(data)
                await sink.drain()
            await self._open[way].wait()
        except OSError:
            return  # reset by one of the two, or by us

    def _notice(self, data: bytes, link: Link) -> None:
        if self._losses and self._losing in data:
            self._losses -= 1
            link.loses_reply = True

    # For a proxy that knows a protocol -----------------------------------------------------------

    def _answer(self, data: bytes, link: Link) -> bytes | None:
        """Return what the client is given of this answer; None to lose it and reset the connection."""
        return None if link.loses_reply else data

    def _ended(self, link: Link) -> None:
        pass


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
