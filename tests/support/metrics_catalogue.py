"""The metrics that the docstring of dovecote.telemetry promises."""

import re

from dovecote import telemetry

_LINE = re.compile(r"^    (dovecote_\w+)(?:\{([\w,]+)\})? (gauge|counter|histogram): ", re.MULTILINE)


def catalogue() -> dict[str, tuple[str, set[str]]]:
    """Return type and labels of each metric, by its name."""
    found: dict[str, tuple[str, set[str]]] = {}
    for name, labels, kind in _LINE.findall(telemetry.__doc__ or ""):
        known = found.setdefault(name, (kind, set()))
        assert known[0] == kind, f"{name} has two types"
        known[1].update(labels.split(",") if labels else ())
    return found


def sample_names() -> set[str]:
    """Return every name that a query may use."""
    parts = {"histogram": ("_bucket", "_sum", "_count"), "gauge": ("",), "counter": ("",)}
    return {name + part for name, (kind, _) in catalogue().items() for part in parts[kind]}
