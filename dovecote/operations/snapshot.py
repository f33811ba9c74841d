"""How a listing reads: from one snapshot, by index, never a whole table."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, text

# With ten million rows and statistics from before they came, the planner may think a scan of them all is
# cheap. Every query of a listing has an index; JIT compiling one takes longer than running it.
_BY_INDEX = text(
    "set local enable_seqscan = off; set local enable_hashjoin = off; set local enable_mergejoin = off;"
    " set local enable_bitmapscan = off; set local jit = off"
)


@contextmanager
def snapshot(engine: Engine) -> Iterator[Connection]:
    """Give a connection that reads one state of the database and writes nothing."""
    with engine.connect().execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True) as connection:
        connection.execute(_BY_INDEX)
        yield connection
