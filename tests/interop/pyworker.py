"""Drives a real Python worker, the worker command on `app.py`, as `gopeer.GoServer` drives Go's."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from redis.asyncio import Redis

from asyncq.broker.keys import CANCEL
from tests.interop.process import MAX_LINE_BYTES, ServerProcess

PROJECT = Path(__file__).parents[2]
APP = "tests.interop.app:mux"


class PyWorker(ServerProcess):
    """A Python worker in a process of its own, for `async with`.

    Inside the block it is registered and hears cancelations. Durations are seconds.
    """

    name = "the Python worker"

    def __init__(
        self,
        url: str,
        *,
        queues: Mapping[str, int] | None = None,
        strict: bool = False,
        concurrency: int = 10,
        shutdown_timeout_s: float = 1.0,
    ) -> None:
        super().__init__(shutdown_timeout_s)
        self._url = url
        self._command = [sys.executable, "-m", "asyncq", "worker", APP]
        self._command += [f"--redis={url}", f"--concurrency={concurrency}"]
        self._command += [f"--shutdown-timeout={shutdown_timeout_s}"]
        for queue, weight in (queues or {"default": 1}).items():
            self._command += [f"--queue={queue}={weight}"]
        if strict:
            self._command += ["--strict"]
        self._heard_before = 0

    async def spawn(self) -> asyncio.subprocess.Process:
        """Start the worker command."""
        self._heard_before = await self._hearing()
        return await asyncio.create_subprocess_exec(
            *self._command,
            cwd=PROJECT,
            env={**os.environ, "PYTHONWARNINGS": "error"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            limit=MAX_LINE_BYTES,
        )

    async def ready(self) -> None:
        """Wait until the server is registered and hears cancelations."""
        await self.wait_for(lambda: self.reached("lifespan"), timeout=30)
        async with asyncio.timeout(10):
            # It says no word about this: only Redis knows.
            while await self._hearing() <= self._heard_before:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def _hearing(self) -> int:
        async with Redis.from_url(self._url) as redis:
            ((_, count),) = await redis.pubsub_numsub(CANCEL)
            return int(count)
