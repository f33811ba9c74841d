"""Processor time: of our processes, and of the servers where they are ours."""

from collections.abc import Mapping

import psutil

from benchmarks.scene import Process, Scene

_SERVERS = {"postgres": "postgres", "valkey-server": "redis", "redis-server": "redis"}


def used(scene: Scene) -> dict[str, float]:
    """Return the processor seconds used so far by each kind of process of the scene and by its servers."""
    seconds: dict[str, float] = {}
    for process in scene.processes:
        seconds[process.name] = seconds.get(process.name, 0.0) + sum(map(_own, family(process)))
    for one in psutil.Process().children(recursive=True):
        try:
            server = _SERVERS.get(one.name())
            if server:
                seconds[server] = seconds.get(server, 0.0) + _with_ended_children(one)
        except psutil.NoSuchProcess:
            continue  # a session of Postgres that ended; its parent has its time
    return seconds


def microseconds_each(before: Mapping[str, float], after: Mapping[str, float], events: int) -> dict[str, float]:
    """Return what an event cost each of them."""
    return {name: round(1e6 * (after[name] - before.get(name, 0.0)) / events, 2) for name in sorted(after)}


def family(process: Process) -> list[psutil.Process]:
    parent = psutil.Process(process.popen.pid)
    return [parent, *parent.children(recursive=True)]


def _own(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _with_ended_children(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)
