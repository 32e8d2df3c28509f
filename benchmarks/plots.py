"""Draws the plots of docs/benchmarks.md; the same results give the same bytes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from benchmarks.measured import Results, Spread
from benchmarks.systems import OURS, SYSTEMS
from benchmarks.workloads import WORKLOADS

OURS_COLOUR, THEIRS_COLOUR, SPREAD_COLOUR = "#c2410c", "#64748b", "#0f172a"
WIDTH = 9.0  # inches, like the others
ROW_HEIGHT = 0.28

BARS = {
    "drain.svg": ("Draining a queue", ["drain-10", "drain-100", "drain-500"]),
    "enqueue.svg": ("Enqueueing", ["enqueue-sequential", "enqueue-50", "enqueue-bulk"]),
}
PICKUP = ("pickup.svg", "Pickup on an idle worker", "pickup")


def titles(results: Results) -> dict[str, str]:
    """Return the plots that the results suffice for: titles by file name."""
    found = {
        name: f"{title}: tasks a second"
        for name, (title, workloads) in BARS.items()
        if any(map(results.took_part, workloads))
    }
    name, title, workload = PICKUP
    if results.took_part(workload):
        found[name] = f"{title}: milliseconds"
    return found


def plot(results: Results, folder: Path) -> None:
    """Draw what was measured into a folder. Raises `SystemExit` without matplotlib."""
    pyplot = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = titles(results)
    for name, (_, workloads) in BARS.items():
        if name in drawn:
            _bars(pyplot, results, [w for w in workloads if results.took_part(w)], folder / name)
    name, _, workload = PICKUP
    if name in drawn:
        _latencies(pyplot, results, workload, folder / name)


def _pyplot() -> Any:
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        raise SystemExit('plots need matplotlib: pip install -e ".[bench]"') from None
    matplotlib.use("svg")
    # Element ids are made from the salt, and would be random without one.
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "asyncq",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    return importlib.import_module("matplotlib.pyplot")


def _bars(pyplot: Any, results: Results, workloads: list[str], path: Path) -> None:
    """Draw a panel a workload: a bar a system with its median, and a line from least to most."""
    most = max(len(results.took_part(workload)) for workload in workloads)
    figure, panels = pyplot.subplots(
        1, len(workloads), figsize=(WIDTH, 0.9 + most * ROW_HEIGHT), squeeze=False
    )
    for panel, workload in zip(panels[0], workloads, strict=True):
        found = _spreads(results, workload, "rate")
        for i, (system, value) in enumerate(found):
            colour = OURS_COLOUR if system == OURS.name else THEIRS_COLOUR
            panel.barh(i, value.median, color=colour, height=0.7)
            panel.plot([value.least, value.most], [i, i], color=SPREAD_COLOUR, linewidth=1)
            panel.annotate(
                f"{value.median:,.0f}", (value.most, i),
                xytext=(4, 0), textcoords="offset points", va="center",
            )  # fmt: skip
        _finish(panel, WORKLOADS[workload].title, [system for system, _ in found])
        panel.set_xticks([])
        panel.spines["bottom"].set_visible(False)
        panel.margins(x=0.25)
        panel.set_xlim(left=0)
    _save(pyplot, figure, path)


def _latencies(pyplot: Any, results: Results, workload: str, path: Path) -> None:
    """Draw a line a system from p50 to p99, on a logarithmic scale."""
    p50 = list(reversed(_spreads(results, workload, "p50_ms")))
    p99 = dict(_spreads(results, workload, "p99_ms"))
    figure, panel = pyplot.subplots(figsize=(WIDTH, 0.9 + len(p50) * ROW_HEIGHT))
    for i, (system, value) in enumerate(p50):
        colour = OURS_COLOUR if system == OURS.name else THEIRS_COLOUR
        high = p99[system].median
        panel.plot([value.median, high], [i, i], color=colour, linewidth=1.5)
        panel.plot([value.median], [i], marker="o", color=colour)
        panel.plot([high], [i], marker="|", markersize=10, color=colour)
        panel.annotate(
            f"{value.median:.2f} / {high:.2f}", (high, i),
            xytext=(8, 0), textcoords="offset points", va="center",
        )  # fmt: skip
    panel.set_xscale("log")
    panel.set_xlabel("milliseconds: p50 (dot) and p99 (bar)")
    panel.margins(x=0.15)
    _finish(panel, WORKLOADS[workload].title, [system for system, _ in p50])
    _save(pyplot, figure, path)


def _spreads(results: Results, workload: str, name: str) -> list[tuple[str, Spread]]:
    """Return what the systems measured, the least median first, which is drawn at the bottom."""
    found = [
        (system, value)
        for system in results.took_part(workload)
        if (value := results.spread(workload, system, name)) is not None
    ]
    return sorted(found, key=lambda pair: pair[1].median)


def _finish(panel: Any, title: str, systems: list[str]) -> None:
    panel.set_title(title, loc="left")
    panel.set_yticks(range(len(systems)), [SYSTEMS[system].title for system in systems])
    panel.tick_params(axis="y", length=0)


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
