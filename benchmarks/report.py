"""What a benchmark returns: rounds, their medians, how they compare, and the machine they ran on."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

VARIANTS = ("ours", "naive", "limit")


@dataclass
class Report:
    """One benchmark's outcome.

    rounds   for each variant what every round measured, in `unit`
    reach    the table's demand, for people
    """

    name: str
    unit: str
    reach: str
    rounds: Mapping[str, Sequence[float]]
    reached: bool
    less_is_better: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def middle(self, variant: str) -> float | None:
        """Return the median of a variant's rounds; None if it was not measured."""
        measured = self.rounds.get(variant)
        return median(measured) if measured else None

    def ratio(self, variant: str) -> float | None:
        """Return how many times better we are."""
        return ratio(self.rounds, variant, less_is_better=self.less_is_better)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            **{variant: _rounded(self.middle(variant)) for variant in VARIANTS},
            "ratio": {variant: _rounded(self.ratio(variant)) for variant in VARIANTS[1:]},
            "rounds": {variant: [_rounded(one) for one in measured] for variant, measured in self.rounds.items()},
            "reached": self.reached,
            "machine": self.machine,
            "details": {"reach": self.reach, "spread": self.spread(), **self.details},
        }

    def spread(self) -> dict[str, float]:
        """Return (most - least) / median of each variant's rounds."""
        return {
            variant: round((max(measured) - min(measured)) / median(measured), 3)
            for variant, measured in self.rounds.items()
            if measured and median(measured)
        }


def ratio(rounds: Mapping[str, Sequence[float]], variant: str, *, less_is_better: bool = False) -> float | None:
    """Return how many times better our median is than the variant's; None if either is missing."""
    ours, other = rounds.get("ours"), rounds.get(variant)
    if not ours or not other or not median(ours) or not median(other):
        return None
    return median(other) / median(ours) if less_is_better else median(ours) / median(other)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of the values do not exceed (nearest rank)."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def machine(postgres: str, redis: str) -> dict[str, Any]:
    """Describe where this ran, as far as it explains a number."""
    model = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "")
    return {
        "cpus": os.cpu_count(),
        "cpu": model,
        "load_before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "postgres": postgres,
        "redis": redis,
        **{name: version(name) for name in ("dramatiq", "psycopg", "sqlalchemy", "orjson")},
        "redis-py": version("redis"),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _rounded(value: float | None) -> float | None:
    if value is None:
        return None
    return round(value, 1) if abs(value) >= 1_000 else round(value, 3)
