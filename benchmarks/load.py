"""The benchmarks: asyncq beside its peers, on one machine, taking turns.

Each round measures workload after workload, and each workload system after system, in another
order every round, so that what else the machine does meets all. README.md tells how to run it,
docs/benchmarks.md how to read it.

    python -m benchmarks.load --help
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from redis.exceptions import RedisError
from rich.console import Console

from benchmarks import floor, machine, report  # report knows every module with workloads
from benchmarks.programs import MeasurementError
from benchmarks.systems import ROOT, SYSTEMS, System
from benchmarks.workloads import WORKLOADS, Bench, Workload, groups

RESULTS = Path(__file__).resolve().parent / "results" / "results.json"
QUICK = 0.1
REPEAT_AFTER_S = 0.5

NewBench: TypeAlias = Callable[[], AbstractContextManager[Bench]]

console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)


@dataclass(frozen=True, slots=True)
class Turn:
    """One measurement to be made."""

    round: int
    workload: Workload
    system: System


def main() -> None:
    """Measure, print the tables, and write what was asked for."""
    options = _options()
    systems = _present(options.systems)
    turns = plan(options.rounds, options.only or list(WORKLOADS), systems)
    if not turns:
        raise SystemExit("none of these systems can do any of these workloads")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="asyncq-bench-") as folder:
        try:
            results = _about(options, systems)
        except machine.NoRedisError as error:
            raise SystemExit(str(error)) from None
        except RedisError as error:
            raise SystemExit(f"the Redis at {options.redis} does not answer: {error}") from None
        console.print(f"{results['redis']}, {len(turns)} measurements")
        measurements: list[dict[str, Any]] = results["measurements"]

        @contextmanager
        def new_bench() -> Iterator[Bench]:
            with machine.store(options.redis) as store:
                yield Bench(store, Path(folder), options.tasks)

        interrupted = _measure(new_bench, turns, measurements)
    for table in report.tables(results):
        console.print(table.rich())
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if interrupted:
        raise SystemExit(128 + signal.SIGINT)
    if options.docs:
        report.write_docs(results)


def plan(rounds: int, names: list[str], systems: list[System]) -> list[Turn]:
    """Put the measurements in order: by round, by workload, and by system, rotated each round."""
    turns: list[Turn] = []
    for number in range(1, rounds + 1):
        for group in groups():
            able = [
                Turn(number, workload, system)
                for workload in group
                for system in systems
                if workload.name in names
                and workload.fits(system)
                and workload.in_round(number, system)
            ]
            first = (number - 1) % max(len(able), 1)
            turns += able[first:] + able[:first]
    return turns


def _measure(new_bench: NewBench, turns: list[Turn], measurements: list[dict[str, Any]]) -> bool:
    """Make the measurements; True if Ctrl-C cut them short."""
    began = time.monotonic()
    hook, sys.unraisablehook = sys.unraisablehook, _repeat_a_lost_interrupt
    try:
        for i, turn in enumerate(turns, 1):
            entry = _measured(new_bench, turn)
            measurements.append(entry)
            _tell(i, len(turns), time.monotonic() - began, turn, entry)
    except KeyboardInterrupt:
        console.print("Stopped by Ctrl-C: here is what was measured so far.")
        return True
    finally:
        sys.unraisablehook = hook
    return False


def _repeat_a_lost_interrupt(lost: sys.UnraisableHookArgs) -> None:
    """Send Ctrl-C again if it fell into a finalizer, from which no exception gets out."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        # from a thread, a moment later: raised here it would be lost like the first
        us = threading.main_thread().ident
        threading.Timer(REPEAT_AFTER_S, signal.pthread_kill, (us, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(lost)


def _measured(new_bench: NewBench, turn: Turn) -> dict[str, Any]:
    """Make one measurement on a bench of its own; if it fails, say why in place of its numbers."""
    began = time.monotonic()
    result: dict[str, Any] = {}
    try:
        with new_bench() as bench:
            result["numbers"] = turn.workload.measure(bench, turn.system)
    except (MeasurementError, machine.NoRedisError) as error:
        result["error"] = str(error)
    except Exception as error:  # whatever it is, it must not cost the run its other numbers
        result["error"] = f"{type(error).__name__}: {error}"
    return {
        "round": turn.round,
        "workload": turn.workload.name,
        "system": turn.system.name,
        "took_s": round(time.monotonic() - began, 2),
        **result,
    }


def _tell(done: int, of: int, elapsed_s: float, turn: Turn, entry: dict[str, Any]) -> None:
    what = f"round {turn.round}  {turn.workload.name:<19} {turn.system.title:<14}"
    outcome = entry.get("error") or report.brief(entry["numbers"])
    console.print(
        f"{done:>4}/{of}  {_clock(elapsed_s)} of about {_clock(elapsed_s / done * of)}  "
        f"{what} {outcome}",
        markup=False,
        style="red" if "error" in entry else None,
    )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _present(names: list[str]) -> list[System]:
    """Return those of the systems that are installed, and say which are not."""
    missing = [name for name in names if not SYSTEMS[name].installed]
    if missing:
        console.print(
            f"Not installed, and left out: {', '.join(missing)}. "
            f"To install: make bench-peers ARGS='{' '.join(missing)}'"
        )
    systems = [SYSTEMS[name] for name in names if name not in missing]
    return [*systems, floor.FLOOR] if systems else []


def _about(options: argparse.Namespace, systems: list[System]) -> dict[str, Any]:
    with machine.store(options.redis) as store:
        version = store.version
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.facts(),
        "redis": version,
        "rounds": options.rounds,
        "tasks": options.tasks,
        "systems": {system.name: _version(system) for system in systems},
        "measurements": [],
    }


def _version(system: System) -> str:
    """Ask the environment of a system which release it holds."""
    if system.language == "Go":
        command = [*system.program, "version"]
    else:
        code = f"from importlib.metadata import version; print(version({system.distribution!r}))"
        command = [system.program[0], "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="load.py", description="Measure asyncq and its peers.")
    add = parser.add_argument
    add(
        "--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), metavar="NAME",
        help=f"of {', '.join(SYSTEMS)} (all that are installed)",
    )  # fmt: skip
    add(
        "--only", nargs="+", choices=list(WORKLOADS), metavar="WORKLOAD",
        help=f"of {', '.join(WORKLOADS)} (all)",
    )  # fmt: skip
    add("--rounds", type=_at_least_one, metavar="N", help="rounds (5, or 1 with --quick)")
    add("--tasks", type=_positive, metavar="SCALE", help="of the tasks (1.0, or 0.1 with --quick)")
    add("--quick", action="store_true", help="a tenth of the tasks, one round")
    add("--redis", metavar="URL", help="this Redis, whose database is EMPTIED (one of its own)")
    add("--json", type=Path, metavar="FILE", help="write every number to a file")
    add("--docs", action="store_true", help="also write docs/benchmarks.md and its plots")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.tasks = options.tasks or (QUICK if options.quick else 1.0)
    if options.docs and options.json is None:
        options.json = RESULTS
    return options


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _positive(text: str) -> float:
    if (number := float(text)) <= 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return number


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the first measurement, or after the last
        raise SystemExit(128 + signal.SIGINT) from None
