"""The proxy of tests/support/proxy.py for Postgres, which can lose exactly the reply to a commit.

A server has committed when it says ReadyForQuery with the status `I`, idle, after a COMMIT or after a
statement that wrote something in a transaction of its own. Everything from the first message that announces it
is held back until then: nobody may hear half of the news.
"""

from tests.support.proxy import Link, Proxy

_COMMAND_COMPLETE, _READY_FOR_QUERY = ord("C"), ord("Z")
_WRITES = (b"COMMIT", b"INSERT", b"UPDATE", b"DELETE")


class Replies:
    """What a server says on one connection. It must be plain: sslmode=disable."""

    def __init__(self) -> None:
        self._incomplete = b""
        self._held = b""

    def feed(self, data: bytes, *, lose: bool) -> tuple[bytes, bool]:
        """Return what may pass, and whether the reply to a commit was found; if so, nothing more may pass."""
        stream = self._incomplete + data
        passed, at = bytearray(), 0
        while len(stream) >= at + 5:
            end = at + 1 + int.from_bytes(stream[at + 1 : at + 5], "big")
            if len(stream) < end:
                break
            kind, message, content = stream[at], stream[at:end], stream[at + 5 : end]
            at = end
            if self._held or (lose and kind == _COMMAND_COMPLETE and content.startswith(_WRITES)):
                self._held += message
            else:
                passed += message
            if kind == _READY_FOR_QUERY and self._held:
                if content == b"I":
                    return bytes(passed), True
                passed += self._held
                self._held = b""
        self._incomplete = stream[at:]
        return bytes(passed), False


class PostgresProxy(Proxy):
    """A proxy that follows what Postgres says."""

    def __init__(self, target_port: int) -> None:
        self._replies: dict[Link, Replies] = {}
        self._commits_to_lose = 0
        super().__init__(target_port)

    def lose_commit_replies(self, times: int) -> None:
        """Let the server commit, and reset the connection instead of saying so, for the next `times` commits."""
        self._commits_to_lose = times

    def heal(self) -> None:
        self._commits_to_lose = 0
        super().heal()

    def _answer(self, data: bytes, link: Link) -> bytes | None:
        answer, found = self._replies.setdefault(link, Replies()).feed(data, lose=self._commits_to_lose > 0)
        if found:
            self._commits_to_lose -= 1
            return None
        return answer

    def _ended(self, link: Link) -> None:
        self._replies.pop(link, None)
