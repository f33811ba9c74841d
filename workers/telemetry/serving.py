"""One small HTTP server a process, in a daemon thread: a few pages by GET, and nothing is logged of it.

A port that is taken is tried again every second, and the process goes on meanwhile. That is how the worker
processes of one Dramatiq master share a port: whoever gets it serves for all of them, and when it dies another
one gets it.
"""

import errno
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple

import structlog

log = structlog.get_logger()

_RETRY_SECONDS = 1.0
# Whoever connects and asks nothing is sent away.
_SILENT_SECONDS = 10.0


class Page(NamedTuple):
    """What a GET is answered with."""

    status: int
    content_type: str
    body: bytes


def serve(host: str, port: int, pages: Mapping[str, Callable[[], Page]]) -> None:
    """Answer GET for these paths from now on until the process ends. Returns at once."""
    threading.Thread(target=_serve, args=(host, port, pages), name="metrics", daemon=True).start()


def _serve(host: str, port: int, pages: Mapping[str, Callable[[], Page]]) -> None:
    told = False
    while True:
        try:
            server = _Server(host, port, pages)
        except OSError as error:
            if error.errno != errno.EADDRINUSE and not told:
                told = True
                log.warning("metrics and health cannot be served", host=host, port=port, error=str(error))
            # Nobody tells when a port is free again.
            time.sleep(_RETRY_SECONDS)
            continue
        # It is never told to stop, so it need not look up for that.
        server.serve_forever(poll_interval=3_600)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, host: str, port: int, pages: Mapping[str, Callable[[], Page]]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.pages = pages
        super().__init__((host, port), _Answering)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Somebody went away before the answer: that is no news."""


class _Answering(BaseHTTPRequestHandler):
    server: _Server
    server_version = "dovecote"
    sys_version = ""
    timeout = _SILENT_SECONDS

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        answer = _made(page) if page else Page(404, "text/plain; charset=utf-8", b"there is no such page\n")
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _made(page: Callable[[], Page]) -> Page:
    try:
        return page()
    except Exception:
        log.exception("a page could not be made")
        return Page(500, "text/plain; charset=utf-8", b"this page could not be made; the log says why\n")
