"""The benchmarks by name. Each is a function from a stage and options to a report."""

from collections.abc import Callable, Mapping
from importlib import import_module

from benchmarks.harness import Options, Stage, stage
from benchmarks.report import Report, machine

Benchmark = Callable[[Stage, Options], Report]

NAMES: Mapping[str, str] = {
    "relay": "benchmarks.throughput:relay",
    "consume": "benchmarks.throughput:consume",
    "ordinary": "benchmarks.throughput:ordinary",
    "drain": "benchmarks.throughput:drain",
    "end-to-end": "benchmarks.end_to_end:end_to_end",
    "latency": "benchmarks.latency:latency",
    "torture": "benchmarks.torture:torture",
    "writers": "benchmarks.writers:writers",
    "history": "benchmarks.history:history",
    "idle": "benchmarks.quiet:idle",
    "memory": "benchmarks.quiet:memory",
    "scale": "benchmarks.scale:scale",
    "peers": "benchmarks.peers.measuring:peers",
}


def run(name: str, options: Options) -> Report:
    """Run one benchmark on servers of its own.

    Errors: KeyError for an unknown name; BenchmarkFailed when something does not happen that had to.
    """
    module, _, function = NAMES[name].partition(":")
    benchmark: Benchmark = getattr(import_module(module), function)
    with stage(getattr(benchmark, "postgres_settings", None)) as servers:
        where = machine(*servers.versions())
        report = benchmark(servers, options)
    report.machine = where
    return report
