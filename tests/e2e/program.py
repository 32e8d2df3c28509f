"""Programs that a test starts as a user would, and that end with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
END_WITHIN_S = 20.0
WITHIN_S = 60.0


def environment(**added: str) -> dict[str, str]:
    """The environment of this process without its settings, and with others."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("ASYNCQ_")}
    return {**ours, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **added}


@contextmanager
def program(
    arguments: Sequence[str],
    log: Path,
    *,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `python ARGUMENTS`, end it with SIGTERM, and show what it wrote if the test fails."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd,
            env=environment(**(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=pass_fds,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        print(f"--- {' '.join(arguments)}: exit code {process.returncode}")
        print(log.read_text(errors="replace"))


@contextmanager
def served(app: str, store_url: str, folder: Path) -> Iterator[httpx.Client]:
    """Run an app under uvicorn in a folder, on a port that we hold before it does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with (
            program(
                ["-m", "uvicorn", "--fd", str(listening.fileno()), app],
                folder / "uvicorn.log",
                cwd=folder,
                env={"ASYNCQ_REDIS_URL": store_url},
                pass_fds=[listening.fileno()],
            ),
            # The first request waits in the backlog until the app is there.
            httpx.Client(
                base_url=f"http://127.0.0.1:{port}", timeout=WITHIN_S, trust_env=False
            ) as http,
        ):
            yield http
