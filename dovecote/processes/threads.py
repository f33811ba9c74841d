"""Work in a thread that holds up nobody's end: what asks a server that may never answer."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Answer = TypeVar("Answer")


def begin(work: Callable[[], Answer], name: str) -> "Future[Answer]":
    """Start the work in a daemon thread; `result(timeout)` of what is returned waits for it, no longer than that."""
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:  # raised where the answer is taken
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True, name=name).start()
    return answer
