"""The load test: how fast this machine enqueues, drains and picks up, beside real Go Asynq.

Go and we take turns in the same Redis, so that what else the machine does meets both; the
ratios count, not the rates. Go decodes the same JSON, with Asynq's defaults and the log level
error; what each side did is counted in Redis after each run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from redis import Redis  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.ours import MEASUREMENTS, Result  # noqa: E402
from tests.interop import gopeer  # noqa: E402

console = Console(width=None if sys.stdout.isatty() else 120)

TASKS = {  # where it is not --tasks
    "sequential": 2_000,
    "pickup": 300,
    "pickup-go": 300,
    "lateness": 300,
    "lateness-go": 300,
    "results": 500,
    "cancel": 100,
}
NEEDS_GO = {"pickup-go", "lateness-go"}

# Ours, and Go's counterpart
AGAINST_GO = {
    "concurrent-raw": ("enqueue", 50),
    "concurrent": ("enqueue", 50),
    "drain": ("drain", 100),
    "drain-10": ("drain", 10),
}
DESCRIPTIONS = {
    "sequential": "sequential enqueue",
    "concurrent": "enqueue, 50 in flight, typed",
    "concurrent-raw": "enqueue, 50 in flight, raw bytes",
    "bulk": "enqueue_many, typed",
    "drain": "drain, concurrency 100, typed",
    "drain-10": "drain, concurrency 10, typed",
    "pickup": "pickup on an idle worker",
    "pickup-go": "the same, of tasks from Go",
    "lateness": "scheduled, after its instant",
    "lateness-go": "scheduled by Go, after its score",
    "results": "result, with 100 waiters",
    "cancel": "cancel, to the handler",
}


def main() -> None:
    """Measure, and print a table."""
    options = _options()
    names = options.only or list(MEASUREMENTS)
    go = None if options.without_go else gopeer.find_go()
    if go is None and not options.without_go:
        console.print("Go is not installed here, so there is no comparison with Go Asynq.")
    if go is not None:
        console.print("Building the Go program ...")
        gopeer.build()
    if go is None:
        names = [name for name in names if name not in NEEDS_GO]
    with _redis(options.redis) as url:
        console.print(f"Redis {_version(url)} at {url}, {options.rounds} rounds")
        rounds = [
            _round(url, names, options.tasks, with_go=go is not None, number=i + 1)
            for i in range(options.rounds)
        ]
    _print(names, rounds)
    if options.json is not None:
        options.json.write_text(json.dumps(rounds, indent=1))


def _round(url: str, names: list[str], tasks: int, *, with_go: bool, number: int) -> Any:
    """Measure everything once, each of ours beside Go's."""
    measured: dict[str, dict[str, Result]] = {}
    for name in names:
        console.print(f"  round {number}: {DESCRIPTIONS[name]}", highlight=False)
        n = TASKS.get(name, tasks)
        measured[name] = {"ours": _ours(url, name, n)}
        if with_go and name in AGAINST_GO:
            kind, concurrency = AGAINST_GO[name]
            measured[name]["go"] = _go(url, kind, n, concurrency)
    return measured


def _ours(url: str, name: str, n: int) -> Result:
    _flush(url)
    if name.startswith("drain"):
        _run_ours("bulk", url, n)
    return _run_ours(name, url, n)


def _run_ours(name: str, url: str, n: int) -> Result:
    command = [sys.executable, "-m", "benchmarks.ours", name, url, str(n)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr or done.stdout}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def _go(url: str, kind: str, n: int, concurrency: int) -> Result:
    _flush(url)
    if kind == "enqueue":
        measurement = asyncio.run(gopeer.go_bench_enqueue(url, n, concurrency))
    else:
        _run_ours("bulk", url, n)
        redis_cpu = _redis_cpu_s(url)
        measurement = asyncio.run(gopeer.go_bench_drain(url, n, concurrency))
        return {
            "rate": measurement.rate,
            "cpu_us": measurement.cpu_seconds / n * 1e6,
            "redis_cpu_us": (_redis_cpu_s(url) - redis_cpu) / n * 1e6,
        }
    return {"rate": measurement.rate, "cpu_us": measurement.cpu_seconds / n * 1e6}


def _print(names: list[str], rounds: list[Any]) -> None:
    table = Table(title=f"Medians of {len(rounds)} rounds")
    for column in (
        "",
        "asyncq",
        "Go Asynq",
        "ratio (least to most)",
        "CPU a task",
        "Redis CPU a task",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for name in names:
        ours = [measured[name]["ours"] for measured in rounds]
        theirs = [measured[name]["go"] for measured in rounds if "go" in measured[name]]
        table.add_row(
            DESCRIPTIONS[name],
            _main(ours),
            _main(theirs),
            _ratio(ours, theirs),
            _pair(ours, theirs, "cpu_us"),
            _pair(ours, theirs, "redis_cpu_us"),
        )
    console.print(table)
    if "sequential" in names:
        trip_ms = median(measured["sequential"]["ours"]["round_trip_ms"] for measured in rounds)
        console.print(f"A bare redis-py GET takes {trip_ms:.3f} ms here.", highlight=False)


def _main(results: list[Result]) -> str:
    if not results:
        return "-"
    if "p50_ms" in results[0]:
        p50, p99 = (median(r[key] for r in results) for key in ("p50_ms", "p99_ms"))
        return f"p50 {p50:.2f} ms, p99 {p99:.2f} ms"
    return f"{median(r['rate'] for r in results):,.0f}/s"


def _ratio(ours: list[Result], theirs: list[Result]) -> str:
    if not theirs:
        return "-"
    ratios = sorted(a["rate"] / b["rate"] for a, b in zip(ours, theirs, strict=True))
    return f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def _pair(ours: list[Result], theirs: list[Result], key: str) -> str:
    if not ours or key not in ours[0]:
        return "-"
    mine = f"{median(r[key] for r in ours):.1f}"
    return f"{mine} / {median(r[key] for r in theirs):.1f} µs" if theirs else f"{mine} µs"


@contextmanager
def _redis(url: str | None) -> Iterator[str]:
    """Use the Redis at `url`, or one that is started for this: the machine's own, or Valkey."""
    if url is not None:
        yield url
        return
    program = shutil.which("redis-server")
    if program is None:
        from asyncq.broker.embedded import server_binary

        program = str(server_binary())
    with tempfile.TemporaryDirectory(prefix="asyncq-") as directory:
        path = f"{directory}/redis.sock"
        server = subprocess.Popen(
            [program, "--port", "0", "--unixsocket", path, "--save", "", "--dir", directory],
            stdout=subprocess.DEVNULL,
        )
        try:
            _wait_for(path)
            yield f"unix://{path}"
        finally:
            server.terminate()
            server.wait()


def _wait_for(path: str) -> None:
    deadline = time.monotonic() + 10
    while not Path(path).exists():
        if time.monotonic() > deadline:
            raise SystemExit("the Redis for the load test did not start")
        time.sleep(0.02)


def _flush(url: str) -> None:
    with Redis.from_url(url) as redis:
        redis.flushdb()


def _redis_cpu_s(url: str) -> float:
    with Redis.from_url(url) as redis:
        info: Any = redis.info("cpu")
    return float(info["used_cpu_user"] + info["used_cpu_sys"])


def _version(url: str) -> str:
    with Redis.from_url(url) as redis:
        info: Any = redis.info("server")
    name = str(info.get("server_name", "redis"))
    return f"{info.get('valkey_version', info['redis_version'])} ({name})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--redis", metavar="URL", help="use this Redis; its database is flushed")
    parser.add_argument("--tasks", type=int, default=20_000, help="tasks a run (20000)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (5)")
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS), metavar="NAME",
                        help=f"measure only these: {', '.join(MEASUREMENTS)}")  # fmt: skip
    parser.add_argument("--without-go", action="store_true", help="do not compare with Go Asynq")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to a file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
