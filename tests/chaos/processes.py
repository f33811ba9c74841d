"""The processes of the system under test: those of the Procfile, with the routes of the test.

Each reaches the servers through the proxies of its role, and has a clock that can be put wrong. All else
is as in production, settings included.
"""

import json
import os
from pathlib import Path

from sqlalchemy import make_url

from dovecote import bootstrap
from tests.chaos import clocks
from tests.chaos.routes import ROUTES
from workers.app import app


def enter(role: str) -> Path:
    """Make this process one of the role; return the directory of the run."""
    directory = Path(os.environ["CHAOS_DIRECTORY"])
    ports = json.loads(os.environ["CHAOS_PORTS"])[role]
    for variable, server in (("DATABASE_URL", "postgres"), ("REDIS_URL", "redis")):
        # The direct way is what the system was started with; the long name would win over the short one.
        direct = os.environ.pop(f"DOVECOTE_{variable.replace('_URL', '__URL')}", None) or os.environ[variable]
        if server in ports:
            os.environ[variable] = make_url(direct).set(port=ports[server]).render_as_string(hide_password=False)
    clocks.follow(directory, role)
    return directory


def consumers() -> None:
    """Called by Dramatiq in each worker process."""
    enter("workers")
    bootstrap.start_consumers(app.with_routes(ROUTES))


def relay() -> None:
    enter("relay")
    bootstrap.run_relay(app.with_routes(ROUTES))


if __name__ == "__main__":
    relay()
