"""The trace context of the caller, as an event carries it: `traceparent` and `tracestate`, and nothing else.

Other headers of a service's propagators (baggage, b3, a vendor's own) are not stored: they may be private, and have no
bound. Tracing never fails an `emit`.
"""

import logging
import re
from collections.abc import Callable

_inject: Callable[[dict[str, str]], None] | None
try:  # a service that traces has it; one that does not needs none
    from opentelemetry.propagate import inject as _inject
except ImportError:
    _inject = None

log = logging.getLogger("dovecote")

# W3C Trace Context, version 00. All zeros are no id.
_TRACEPARENT = re.compile("00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
# "At least 512 characters" are to be carried; more need not be.
_TRACESTATE = re.compile("[\x20-\x7e]{1,512}")

_has_warned = False


def trace_headers() -> dict[str, str]:
    """Return the headers of the current trace, at most 567 characters; none outside of any."""
    if _inject is None:
        return {}
    carrier: dict[str, str] = {}
    try:
        _inject(carrier)
    except Exception:
        _warn_once()
    traceparent, tracestate = carrier.get("traceparent"), carrier.get("tracestate")
    if not (isinstance(traceparent, str) and _TRACEPARENT.fullmatch(traceparent)):
        return {}
    if isinstance(tracestate, str) and _TRACESTATE.fullmatch(tracestate):
        return {"traceparent": traceparent, "tracestate": tracestate}
    return {"traceparent": traceparent}


def _warn_once() -> None:
    global _has_warned
    if not _has_warned:
        _has_warned = True
        log.warning("a trace propagator failed; events are emitted without what it would have added", exc_info=True)
