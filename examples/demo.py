"""Runs a day of a shop on a store and a worker of its own, and shows what happens: `make demo`.

It enqueues the orders of examples/data/orders.jsonl and thousands of price labels, which a real
worker process handles as examples/shop.py says: some succeed at once, some fail and are retried,
one is scheduled, one is refused as a duplicate, some are archived. At the end it reads everything
back from the store. The exit code is 0 only if all of it is as it should be; nothing is left
behind either way.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from asyncq import AsyncqError, Client
from asyncq.inspector import Inspector
from examples.day import Check, check_files, check_store, ended, goals, run_day
from examples.shop import Order

ROOT = Path(__file__).resolve().parent.parent
ORDERS = ROOT / "examples" / "data" / "orders.jsonl"
LABELS = 5000
QUEUES = {"critical": 6, "default": 3, "low": 1}
CONTENTS = {"critical": "orders", "default": "mails", "low": "labels"}

LOOK_S = 0.1  # between two looks at the queues
LINE_S = 0.5  # between two lines of progress, where there is no terminal
DONE_WITHIN_S = 60.0
STOPPED_WITHIN_S = 15.0
LAST_LINES = 15

T = TypeVar("T")
Show = Callable[[Mapping[str, int]], None]
"""Is told how many tasks of each queue have ended."""


class DemoError(Exception):
    """The demo did not come to its end; the message tells why."""


def main() -> int:
    """Run the demo, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--labels", type=int, default=LABELS, help=f"how many (default: {LABELS})")
    labels = parser.parse_args().labels
    for number in (signal.SIGTERM, signal.SIGHUP):  # clean up then, too
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    # Where nobody says how wide it is, 80 columns would break the table.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    try:
        with scratch_folder() as folder:
            checks = asyncio.run(demo(console, folder, labels))
    except KeyboardInterrupt:
        console.print("Stopped by Ctrl-C. The worker has ended, and nothing is left behind.")
        return 128 + signal.SIGINT
    except (DemoError, AsyncqError) as error:
        console.print(f"[red]The demo failed:[/] {escape(str(error))}")
        return 1
    return report(console, checks)


async def demo(console: Console, folder: Path, labels: int) -> list[Check]:
    """Let a worker do a day's work on a fresh store, and check what came of it."""
    orders = [Order.model_validate_json(line) for line in ORDERS.read_text().splitlines()]
    url = f"embedded://{quote(str(folder / 'store'))}"
    async with Client(url) as client, Inspector(url) as inspector:
        console.print(f"Store:  an embedded Valkey in {folder.relative_to(ROOT) / 'store'}")
        async with worker(url, folder) as process:
            console.print(f"Worker: process {process.pid}, queues {', '.join(QUEUES)}")
            console.print(f"Work:   {len(orders)} orders and their mails, {labels:,} labels")
            progress = bars if console.is_terminal else lines
            with progress(console, goals(orders, labels)) as show:
                day = await while_it_lives(
                    process,
                    shown(show, inspector, run_day(client, inspector, orders, labels)),
                    folder / "worker.log",
                )
        # The worker is gone, so everything is saved, in the store and in files.
        return [
            *await check_store(client, inspector, day),
            *check_files(folder / "shop", day),
            Check("exit code of the worker", "0", str(process.returncode)),
        ]


def report(console: Console, checks: list[Check]) -> int:
    """Print the summary, and return the exit code that it stands for."""
    table = Table("", "expected", "read back", "", box=SIMPLE_HEAD)
    for check in checks:
        mark = "[green]ok[/]" if check.is_right else "[red]wrong[/]"
        table.add_row(check.what, check.expected, check.found, f"{mark} {escape(check.note)}")
    console.print(table)
    wrong = [check for check in checks if not check.is_right]
    for check in wrong:
        console.print(f"[red]Wrong:[/] {check.what}: {check.found}, not {check.expected}")
    if not wrong:
        console.print("All is as it should be. The handlers are in examples/shop.py.")
    return 1 if wrong else 0


# The worker


@asynccontextmanager
async def worker(url: str, folder: Path) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Run a worker as anybody would from the command line; it ends with the block."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("ASYNCQ_")}
    queues = [word for name, weight in QUEUES.items() for word in ("--queue", f"{name}={weight}")]
    with (folder / "worker.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "asyncq", "worker", "examples.shop:mux", *queues),
            cwd=ROOT,
            env={**others, "ASYNCQ_REDIS_URL": url, "SHOP_FOLDER": str(folder / "shop")},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(STOPPED_WITHIN_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def while_it_lives(
    process: asyncio.subprocess.Process, work: Coroutine[Any, Any, T], log: Path
) -> T:
    """Return what the work gives.

    Raises:
        DemoError: the process ended before the work, or the work takes too long.
    """
    working, ending = asyncio.create_task(work), asyncio.create_task(process.wait())
    try:
        await asyncio.wait(
            {working, ending}, timeout=DONE_WITHIN_S, return_when=asyncio.FIRST_COMPLETED
        )
        if working.done():
            return working.result()
        if ending.done():
            how = how_it_ended(ending.result())
            raise DemoError(f"the worker {how} in the middle of the work.{last_lines(log)}")
        raise DemoError(f"the work is not done after {DONE_WITHIN_S:.0f} s.{last_lines(log)}")
    finally:
        working.cancel()
        ending.cancel()
        await asyncio.gather(working, ending, return_exceptions=True)


def how_it_ended(returncode: int) -> str:
    """Put a return code into words."""
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"ended with exit code {returncode}"


def last_lines(log: Path) -> str:
    """Return the end of the worker's log, to be shown below a message."""
    found = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
    return "".join(f"\n  {line}" for line in [f"The end of its log ({log.name}):", *found])


# Progress


async def shown(show: Show, inspector: Inspector, work: Coroutine[Any, Any, T]) -> T:
    """Show how far the queues are while the work is done, and at its end."""

    async def look() -> None:
        show({queue.queue: ended(queue) for queue in await inspector.queue_infos()})

    async def watch() -> None:
        while True:
            await look()
            await asyncio.sleep(LOOK_S)

    watching = asyncio.create_task(watch())
    try:
        done = await work
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    await look()
    return done


@contextmanager
def bars(console: Console, goals: Mapping[str, int]) -> Generator[Show]:
    """Show progress as bars, on a terminal."""
    columns = (TextColumn("{task.description:>7}"), BarColumn(40), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        ids = {name: progress.add_task(CONTENTS[name], total=goal) for name, goal in goals.items()}

        def show(done: Mapping[str, int]) -> None:
            for name, n in done.items():
                progress.update(ids[name], completed=n)

        yield show


@contextmanager
def lines(console: Console, goals: Mapping[str, int]) -> Generator[Show]:
    """Show progress as lines, in files and pipes."""
    started = time.monotonic()
    shown_at, before = started - LINE_S, ""

    def show(done: Mapping[str, int]) -> None:
        nonlocal shown_at, before
        now = time.monotonic()
        text = ", ".join(
            f"{CONTENTS[name]} {done.get(name, 0):,} of {goal:,}" for name, goal in goals.items()
        )
        at_goal = all(done.get(name) == goal for name, goal in goals.items())
        if text != before and (at_goal or now >= shown_at + LINE_S):
            shown_at, before = now, text
            console.print(f"{now - started:5.1f} s  {text}")

    yield show


# Nothing is left behind


@contextmanager
def scratch_folder() -> Generator[Path]:
    """Give a folder inside the project that is gone afterwards, with the store that is in it."""
    cache = ROOT / ".cache"
    cache.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="demo-", dir=cache))
    try:
        yield folder
    finally:
        # The store stops by itself when its last user has gone, and then takes its socket away.
        deadline = time.monotonic() + STOPPED_WITHIN_S
        while (folder / "store" / "socket").is_symlink() and time.monotonic() < deadline:
            time.sleep(0.01)
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
