"""Curves as pictures, for people: PNG and SVG in benchmarks/plots. Without matplotlib there are none."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: What benchmarks/README.md shows; those of a quick run go into a folder below.
SHOWN = Path(__file__).parent / "plots"
ROUGH = SHOWN / "quick"
_WITHOUT = "none: matplotlib is not installed; in the checkout, .venv/bin/pip install -e '.[bench]' brings it"

# Okabe and Ito's colours, distinguishable with every kind of colour vision; the markers differ too.
_BLUE, _VERMILLION, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
_STYLE: Any = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.ymargin": 0.12,
    "font.size": 10,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "svg.hashsalt": "dovecote",
    "svg.fonttype": "none",
}

Points = Sequence[Mapping[str, Any]]


def draw(curves: Mapping[str, Points], latency_at: int, place: Path) -> list[str] | str:
    """Draw the curves of `scale`; return the files, or the sentence that says why there are none."""
    try:
        import matplotlib as mpl
    except ImportError:
        return _WITHOUT
    mpl.use("agg")
    place.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, tuple[Callable[..., None], str]] = {
        "processes": (_processes, f"Worker processes (bundles of 500; latency at {latency_at:,} events/s offered)"),
        "bundle_size": (_bundles, f"Bundle size (1 worker process; latency at {latency_at:,} events/s offered)"),
        "load": (_loads, "Offered load (1 relay, 1 worker process; writers on the same machine)"),
    }
    with mpl.rc_context(_STYLE):
        return [
            file
            for name, (panels, title) in pictures.items()
            for file in _picture(place / name.replace("_", "-"), panels, title, curves[f"by_{name}"])
        ]


def _picture(path: Path, panels: Callable[..., None], title: str, points: Points) -> list[str]:
    from matplotlib import pyplot
    from matplotlib.ticker import StrMethodFormatter

    figure, (rate, latency) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(title, fontsize=12)
    rate.set_ylabel("events/s")
    latency.set_ylabel("commit to handler, ms")
    panels(points, rate, latency)
    for axes in (rate, latency):
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.legend(frameon=False)
    files = []
    for suffix, more in (("png", {"dpi": 110}), ("svg", {"metadata": {"Date": None}})):
        file = path.with_suffix(f".{suffix}")
        figure.savefig(file, **more)
        files.append(str(file))
    pyplot.close(figure)
    return files


def _processes(points: Points, rate: Any, latency: Any) -> None:
    x = [point["processes"] for point in points]
    rate.plot(x, _of(points, "events_per_second"), "o-", color=_BLUE, label="queues to effects")
    rate.set_ylim(bottom=0)
    _quantiles(x, points, latency)
    latency.set_ylim(bottom=0)
    for axes in (rate, latency):
        axes.set_xlabel("worker processes")
        axes.set_xticks(x)


def _bundles(points: Points, rate: Any, latency: Any) -> None:
    x = [point["bundle_size"] for point in points]
    rate.plot(x, _of(points, "relay_events_per_second"), "s--", color=_GREEN, label="outbox to queues")
    rate.plot(x, _of(points, "events_per_second"), "o-", color=_BLUE, label="queues to effects")
    rate.set_yscale("log")
    _quantiles(x, points, latency)
    latency.set_yscale("log")
    for axes in (rate, latency):
        axes.set_xlabel("most events of a bundle")
        _log_x(axes, x)


def _loads(points: Points, rate: Any, latency: Any) -> None:
    from matplotlib.ticker import LogLocator

    x = [point["load"] for point in points]
    rate.plot(x, x, ":", color=_GREY, label="as offered")
    rate.plot(x, _of(points, "events_per_second"), "o-", color=_BLUE, label="achieved, to effects")
    rate.set_yscale("log")
    _quantiles(x, points, latency)
    latency.set_yscale("log")
    for axes in (rate, latency):
        axes.set_xlabel("offered, events/s")
        _log_x(axes, [place for place in x if f"{place}".strip("0") == "1"] or x)
    # From a few milliseconds to some tens: powers of ten alone would name one place.
    latency.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def _quantiles(x: Sequence[int], points: Points, axes: Any) -> None:
    axes.plot(x, _of(points, "p99_ms"), "^-", color=_VERMILLION, label="p99")
    axes.plot(x, _of(points, "p50_ms"), "o-", color=_BLUE, label="p50")


def _log_x(axes: Any, ticks: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=0 if len(ticks) < 7 else 30)
    axes.minorticks_off()


def _of(points: Points, name: str) -> list[float]:
    return [point[name] for point in points]
