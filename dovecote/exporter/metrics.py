"""What relay and consumers report, kept as Prometheus metrics. The catalogue is in the docstring of the package.

The consumers of one Dramatiq master keep theirs in files of one directory, so that any of them can report for all.
"""

import hashlib
import os
import shutil
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    multiprocess,
    values,
)

from dovecote.envelope import Envelope
from dovecote.processes.children import started_at
from dovecote.processes.state_directory import ensure_private_directory
from dovecote.store.delivery_state import DeliveryState
from dovecote.telemetry.instrumentation import ConsumerInstrumentation, RelayInstrumentation, RelayState

_EVENTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 50_000)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3_600)


class BulkHistogram(Histogram):
    """A histogram that takes many values at once: of 500, each costs 0.05 to 0.1 us instead of 1 to 4.5."""

    def observe_many(self, amounts: Iterable[float]) -> None:
        """Do what `observe` does for each, with one step a bucket."""
        ordered = sorted(amounts)
        self._sum.inc(sum(ordered))
        below = 0
        for bucket, bound in zip(self._buckets, self._upper_bounds, strict=True):
            upto = bisect_right(ordered, bound, below)
            if upto > below:
                bucket.inc(upto - below)
            below = upto


class RelayMetrics(RelayInstrumentation):
    """Of one relay, in the memory of its process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # Or each would have a second one beside it, which says when it began. Nobody asks for that.
        disable_created_metrics()
        self.state: RelayState = "starting"
        self.heartbeat = time.time()
        self._heartbeat = Gauge(
            "dovecote_heartbeat_timestamp_seconds", "Last sign of life, in Unix time.", registry=registry
        )
        self._state = Gauge("dovecote_relay_state", "1 for what this relay does.", ["state"], registry=registry)
        self._published = Counter("dovecote_published_events_total", "Events recorded as published.", registry=registry)
        self._batch = Histogram(
            "dovecote_batch_events", "Events of a published batch.", buckets=_EVENTS, registry=registry
        )
        self._sent = Counter(
            "dovecote_published_bundles_total", "Messages of batches and retries put on queues.", registry=registry
        )
        self._retried = Counter("dovecote_retried_events_total", "Deliveries sent once more.", registry=registry)
        self._republished = Counter(
            "dovecote_republished_bundles_total", "Messages sent again because Redis had lost them.", registry=registry
        )
        self._reconciled = Counter(
            "dovecote_reconciled_events_total",
            "Events that a queue had lost, sent again.",
            ["handler"],
            registry=registry,
        )
        self._reaped = Counter(
            "dovecote_reaped_messages_total", "Messages requeued from dead workers.", registry=registry
        )
        self._wakeups = Counter("dovecote_wakeups_total", "Times a writer woke the relay.", registry=registry)
        for state in get_args(RelayState):
            self._state.labels(state=state).set(state == self.state)
        self.alive("starting")

    def alive(self, state: RelayState) -> None:
        self.heartbeat = time.time()
        self._heartbeat.set(self.heartbeat)
        if state != self.state:
            self._state.labels(state=self.state).set(0)
            self._state.labels(state=state).set(1)
            self.state = state

    def published(self, events: int) -> None:
        self._published.inc(events)
        self._batch.observe(events)

    def sent(self, bundles: int) -> None:
        self._sent.inc(bundles)

    def retried(self, events: int) -> None:
        self._retried.inc(events)

    def republished(self, bundles: int) -> None:
        self._republished.inc(bundles)

    def reconciled(self, handler: str, events: int) -> None:
        self._reconciled.labels(handler=handler).inc(events)

    def reaped(self, messages: int) -> None:
        self._reaped.inc(messages)

    def rang(self) -> None:
        self._wakeups.inc()


class ConsumerMetrics(ConsumerInstrumentation):
    """Of one worker process, in files that all workers of its master share; see `shared_directory`."""

    def __init__(self, handlers: Iterable[str]) -> None:
        self._fetched: dict[str, float] = {}
        self._began: dict[int, float] = {}
        # In no registry: they are read from the files. A worker that is gone has no heartbeat, but has done its work.
        self._heartbeat = Gauge(
            "dovecote_heartbeat_timestamp_seconds",
            "Last sign of life, in Unix time.",
            multiprocess_mode="liveall",
            registry=None,
        )
        self._in_flight = Gauge(
            "dovecote_in_flight_seconds",
            "How long the oldest bundle in a handler's hands has been there; 0 when idle.",
            multiprocess_mode="liveall",
            registry=None,
        )
        self._processed = _counter("dovecote_processed_events_total", "Events whose effect is committed.", "handler")
        self._failed = _counter(
            "dovecote_failed_events_total", "Failures, by what became of the event.", "handler", "state"
        )
        self._parked = _counter("dovecote_parked_events_total", "Events put behind an earlier one.", "handler")
        self._phantoms = _counter(
            "dovecote_phantom_events_total", "Events passed over, because they are not in the outbox.", "handler"
        )
        self._refused = _counter(
            "dovecote_refused_messages_total", "Messages that no relay made as they are.", "queue", "reason"
        )
        self._bundle = _histogram("dovecote_bundle_events", "Events of a bundle.", _EVENTS)
        self._duration = _histogram(
            "dovecote_handler_duration_seconds", "One call of the handler: an event, or a bundle with bulk.", _SECONDS
        )
        self._commit_to_effect = _histogram(
            "dovecote_commit_to_effect_seconds", "From the event's row to the commit of its effect.", _SECONDS
        )
        self._heartbeat.set(time.time())
        for handler in handlers:
            self._processed.labels(handler=handler)
            self._parked.labels(handler=handler)
            self._phantoms.labels(handler=handler)
            for state in (DeliveryState.RETRYING, DeliveryState.DEAD):
                self._failed.labels(handler=handler, state=state)

    def fetching(self, queue: str) -> None:
        self._fetched[queue] = time.time()
        # The thread of each queue reports its own; the one that has been silent longest is what matters.
        self._heartbeat.set(min(list(self._fetched.values())))
        self._in_flight.set(self._oldest_in_flight())

    @contextmanager
    def in_flight(self, handler: str, events: int) -> Iterator[None]:
        thread = threading.get_ident()
        self._began[thread] = time.monotonic()
        try:
            yield
        finally:
            del self._began[thread]
            self._bundle.labels(handler=handler).observe(events)

    def _oldest_in_flight(self) -> float:
        began = list(self._began.values())
        return time.monotonic() - min(began) if began else 0.0

    def handled(self, handler: str, times: Sequence[float]) -> None:
        self._duration.labels(handler=handler).observe_many(after - before for before, after in pairwise(times))

    def acted(self, handler: str, envelopes: Sequence[Envelope], *, again: bool) -> None:
        self._processed.labels(handler=handler).inc(len(envelopes))
        if not again:  # a replay acts on what is years old
            self._commit_to_effect.labels(handler=handler).observe_many(ages(envelopes, datetime.now(UTC)))

    def failed(self, handler: str, state: str) -> None:
        self._failed.labels(handler=handler, state=state).inc()

    def parked(self, handler: str, events: int) -> None:
        self._parked.labels(handler=handler).inc(events)

    def refused(self, queue: str, reason: str) -> None:
        self._refused.labels(queue=queue, reason=reason).inc()

    def phantoms(self, handler: str, events: int) -> None:
        self._phantoms.labels(handler=handler).inc(events)


def ages(envelopes: Iterable[Envelope], now: datetime) -> list[float]:
    """Return how many seconds ago each event's row was written, at 0.35 us an event; 0 where clocks differ."""
    found = [(now - datetime.fromisoformat(envelope.time)).total_seconds() for envelope in envelopes]
    return found if min(found, default=0.0) >= 0.0 else [max(0.0, age) for age in found]


def _counter(name: str, meaning: str, *labels: str) -> Counter:
    return Counter(name, meaning, labels, registry=None)


def _histogram(name: str, meaning: str, buckets: Sequence[float]) -> BulkHistogram:
    return BulkHistogram(name, meaning, ["handler"], buckets=buckets, registry=None)


class OwnHeartbeat(ConsumerInstrumentation):
    """Of a worker that has no place for metrics: it works, and can show that it lives."""

    def __init__(self) -> None:
        self.heartbeat = time.time()

    def fetching(self, queue: str) -> None:
        self.heartbeat = time.time()


# The files that workers share ------------------------------------------------------------------


def shared_directory(secret: str = "") -> Path:
    """Return where this worker and those beside it keep their metrics, and have them kept there from now on.

    It belongs to the master, by pid and start: one that gets the pid of another begins with nothing. Its name follows
    from `secret` besides, so that all workers find it and nobody else can make it before them. What masters left that
    are gone is removed.
    Errors: StateDirectoryError or OSError when it cannot be made.
    """
    temporary, ours = Path(tempfile.gettempdir()), f"dovecote-metrics-{os.geteuid()}-"
    for left in temporary.glob(f"{ours}*"):
        pid, _, start = left.name.removeprefix(ours).rpartition("-")[0].partition("-")
        if pid.isdigit() and str(started_at(int(pid))) != start and left.lstat().st_uid == os.geteuid():
            shutil.rmtree(left, ignore_errors=True)  # another worker may be at it too
    master = os.getppid()
    owner = f"{master}-{started_at(master)}"
    digest = hashlib.blake2b(owner.encode(), key=hashlib.sha256(secret.encode()).digest(), digest_size=12).hexdigest()
    directory = temporary / f"{ours}{owner}-{digest}"
    ensure_private_directory(directory)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    # Chosen when prometheus_client is imported, which a handler's module may have done before us.
    values.ValueClass = values.get_value_class()
    return directory


def merged_registry(directory: Path) -> CollectorRegistry:
    """Return what all workers that share the directory have reported, also dead ones."""
    for file in directory.glob("gauge_live*.db"):
        pid = int(file.stem.rpartition("_")[2])
        if started_at(pid) is None:
            multiprocess.mark_process_dead(pid, str(directory))
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(directory))
    return registry


def heartbeats(directory: Path) -> Mapping[int, float]:
    """Return the last sign of life of each worker, in Unix time, by its pid."""
    return {
        int(sample.labels["pid"]): sample.value
        for metric in merged_registry(directory).collect()
        if metric.name == "dovecote_heartbeat_timestamp_seconds"
        for sample in metric.samples
    }


def as_text(registry: CollectorRegistry) -> bytes:
    """Return the metrics in Prometheus' text format."""
    return generate_latest(registry)
