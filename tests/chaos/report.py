"""How a run, or many, are shown: one JSON object for machines, a page for people."""

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from tests.chaos.run import Report

_COUNTS = (
    "events",
    "effects",
    "rolled_back",
    "forgotten",
    "lost",
    "doubled",
    "never_committed",
    "phantoms",
    "out_of_order",
    "wrong_sums",
    "mistakes",
    "unreported",
)


def summarize(reports: Sequence[Report]) -> dict[str, Any]:
    """Return one run as it is, and many as sums and worst cases, with each of them below `runs`."""
    if len(reports) == 1:
        return reports[0].as_json()
    recovered: dict[str, list[float]] = {}
    for report in reports:
        for kind, seconds in report.recovery_seconds.items():
            recovered.setdefault(kind, []).append(seconds)
    return {
        "seed": [report.seed for report in reports],
        "seconds": sum(report.seconds for report in reports),
        "kept_promises": all(report.kept_promises for report in reports),
        "faults": dict(sorted(sum((Counter(report.faults) for report in reports), Counter()).items())),
        "moot": dict(sorted(sum((Counter(report.moot) for report in reports), Counter()).items())),
        **{name: sum(getattr(report, name) for report in reports) for name in _COUNTS},
        "longest_stall_seconds": max(report.longest_stall_seconds for report in reports),
        "recovery_seconds": {kind: max(seconds) for kind, seconds in sorted(recovered.items())},
        "median_recovery_seconds": {kind: round(median(seconds), 2) for kind, seconds in sorted(recovered.items())},
        "broken_seeds": [report.seed for report in reports if not report.kept_promises],
        "runs": [report.as_json() for report in reports],
    }


def page(summary: dict[str, Any]) -> str:
    """Return the summary as lines of text."""
    runs = len(summary["seed"]) if isinstance(summary["seed"], list) else 1
    faults = sum(summary["faults"].values())
    lines = [
        "",
        f"seed {summary['seed']}: {summary['seconds']:g} s, {faults} faults of {len(summary['faults'])} kinds"
        + (f", {sum(summary['moot'].values())} more found nothing to befall" if summary["moot"] else ""),
        "",
        f"{'fault':<36}{'times':>6}{'worst recovery, s':>20}",
        *(
            f"{kind:<36}{times:>6}{summary['recovery_seconds'].get(kind, 0):>20.2f}"
            for kind, times in summary["faults"].items()
        ),
        "",
        *(f"{name.replace('_', ' '):<36}{summary[name]:>6}" for name in _COUNTS),
        f"{'longest stall, s':<36}{summary['longest_stall_seconds']:>6.2f}",
        "",
        "every promise was kept" if summary["kept_promises"] else "A PROMISE BROKE",
    ]
    if runs > 1 and summary["broken_seeds"]:
        lines.append(f"broken with the seeds {summary['broken_seeds']}")
    return "\n".join(lines)
