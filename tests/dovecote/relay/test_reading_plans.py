"""Every read of the relay finds its rows by index, in every partition, whatever the statistics say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dovecote.bootstrap import relay_for
from dovecote.route import Dovecote
from dovecote.store import gaps
from dovecote.store import reader as reading
from tests.conftest import Servers, settings_for
from tests.support.outbox_rows import Connection
from workers.routes import ROUTES

pytestmark = pytest.mark.servers

READS = {
    "above the high-water mark": (reading._BEYOND, "bigint, bigint, bigint", "4000, 1500, 100"),
    "in the gaps": (
        reading._IN_GAPS,
        "bigint, bigint[], bigint[], int8multirange, bigint, bigint",
        "4000, '{10,50}', '{10,60}', '{[10,11),[50,55),[57,61)}', 100, 100",
    ),
    "behind what is unread": (
        gaps.BEHIND_UNREAD,
        "bigint[], bigint, bigint, int8multirange",
        "'{1500,1510,1600}', 10, 60, '{[10,11),[50,55),[57,61)}'",
    ),
    "in a batch": (reading._IN_BATCHES, "bigint, int8multirange, bigint, bigint", "4000, '{[10,20),[30,40)}', 0, 100"),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("events", [0, 2_000])
def test_every_read_finds_its_rows_by_their_position_in_every_partition(
    url: str, servers: Servers, tmp_path: Path, read: str, events: int
) -> None:
    query, types, arguments = READS[read]
    for number in range(1, query.count("%s") + 1):
        query = query.replace("%s", f"${number}", 1)
    with relay_for(settings_for(url, servers.redis_url, tmp_path), Dovecote(routes=ROUTES))._session() as connection:
        _fill(connection, events)
        partitions = {name for (name,) in connection.execute(_PARTITIONS)}
        connection.execute(f"prepare reading ({types}) as {query}")
        for kind in ("custom", "generic"):
            connection.execute(f"set plan_cache_mode = force_{kind}_plan")
            (plan,) = connection.execute(f"explain (format json) execute reading ({arguments})").fetchone() or ([],)

            nodes = list(_nodes(plan[0]["Plan"]))
            scans = [node for node in nodes if node.get("Relation Name", "").startswith("outbox")]
            assert {scan["Relation Name"] for scan in scans} == partitions
            assert {scan["Node Type"] for scan in scans} <= {"Index Scan", "Index Only Scan"}
            indexes = {"behind what is unread": ("_position_idx", "_aggregate_")}.get(read, ("_position_idx",))
            assert {name for name in indexes for scan in scans if name in scan["Index Name"]} == set(indexes)
            assert all(any(name in scan["Index Name"] for name in indexes) for scan in scans)
            assert all('"position"' in scan.get("Index Cond", "") for scan in scans), "the whole history is read"
            if read == "above the high-water mark":
                assert "Sort" not in {node["Node Type"] for node in nodes}


_PARTITIONS = "select inhrelid::regclass::text from pg_inherits where inhparent = 'dovecote.outbox'::regclass"


def _fill(connection: Connection, events: int) -> None:
    connection.execute("set search_path = dovecote")
    connection.execute(
        """
        insert into outbox (aggregate_type, aggregate_id, event_type, payload)
        select 'price', mod(n, 100), 'pricing.price_quoted.v1', '{}' from generate_series(1, %s) n
        """,
        (events,),
    )
    connection.execute("analyze outbox")


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from _nodes(inner)
