"""What a load leaves behind: dead tuples, and bytes a second identical load adds that the first did not."""

from itertools import pairwise
from typing import Any

from benchmarks.scene import APPEND_ONLY, Scene

# Tables grow by pages, and on a busy machine by a few dozen pages at a time.
_SLACK_BYTES = 1_000_000
_SLACK = 1.05


class Footprint:
    """Measures one scene before a load, after it, and after the same load again.

    Make it before the first load; call `mark(events)` after each, when the processes have ended.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._sizes = [scene.table_bytes()]
        self._events: list[int] = []
        self._dead: dict[str, int] = {}

    def mark(self, events: int) -> None:
        """Note what a load of so many events left."""
        self._events.append(events)
        self._sizes.append(self._scene.table_bytes())
        self._dead = self._scene.dead_tuples()

    @property
    def is_clean(self) -> bool:
        """Nothing is dead, and the second load took no more room for its events than the first."""
        return not any(self._dead.values()) and all(
            _grew_as_before(self._grown(table), self._events) for table in APPEND_ONLY
        )

    def details(self) -> dict[str, Any]:
        """Return `n_dead_tup` and, for each load, the bytes an event added to each table with its indexes."""
        grown = {table: self._grown(table) for table in self._sizes[-1]}
        return {
            "n_dead_tup": self._dead,
            "bytes_per_event_of_each_load": {
                table: [round(size / events, 1) for size, events in zip(sizes, self._events, strict=True)]
                for table, sizes in grown.items()
                if any(sizes)
            },
        }

    def _grown(self, table: str) -> list[int]:
        sizes = [size.get(table, 0) for size in self._sizes]
        return [after - before for before, after in pairwise(sizes)]


def _grew_as_before(grown: list[int], events: list[int]) -> bool:
    if len(grown) < 2:
        return True
    return grown[-1] <= grown[0] / events[0] * events[-1] * _SLACK + _SLACK_BYTES
