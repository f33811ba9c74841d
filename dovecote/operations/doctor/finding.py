"""What a check says."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dovecote.route import Route
from dovecote.settings import Settings

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One check's answer; `advice` is empty where all is well."""

    check: str
    level: Level
    found: str
    advice: str


@dataclass(frozen=True)
class Examination:
    findings: Sequence[Finding]

    @property
    def has_errors(self) -> bool:
        return any(finding.level == "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {"findings": [asdict(finding) for finding in self.findings]}


@dataclass(frozen=True)
class Subject:
    """What is examined."""

    settings: Settings
    routes: Sequence[Route]
    now: Callable[[], float]
    migration_locations: Sequence[Path] = ()


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found, "")


def warning(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "warning", found, advice)


def error(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "error", found, advice)


def skew(check: str, of: str, seconds: float) -> Finding:
    """Judge how far a server's clock is ahead of this machine's."""
    found = f"{of} is {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} this machine"
    advice = "Let NTP (chrony, systemd-timesyncd) keep the clocks of all machines: ids and retries depend on them."
    if abs(seconds) >= 5:
        return error(check, found, advice)
    return warning(check, found, advice) if abs(seconds) >= 1 else ok(check, found)
