"""A process of consumers of this application: `dramatiq workers.consumers:start --path`."""

from dovecote.bootstrap import start_consumers
from workers.app import app


def start() -> None:
    """Called by Dramatiq in each worker process."""
    start_consumers(app)
