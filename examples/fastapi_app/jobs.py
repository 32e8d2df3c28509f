"""The jobs of the app: the routes enqueue them, a worker runs them.

python -m asyncq worker examples.fastapi_app.jobs:mux
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io

from pydantic import BaseModel, Field

from asyncq import Context, Mux

DAY_S = 24 * 3600

mux = Mux()


class Export(BaseModel):
    """What to export."""

    customer: int
    rows: int = Field(gt=0, le=100_000)
    seconds_a_row: float = Field(0.01, ge=0, le=1)
    """How slow the source is, for which the job stands."""


class Exported(BaseModel):
    """What came of an export."""

    rows: int
    size_bytes: int
    sha256: str


class Signup(BaseModel):
    """Somebody new."""

    email: str = Field(pattern=r"^[^@\s]+@[^@\s]+$")


@mux.task("customer:export", queue="low", max_retry=3, timeout=3600, retention=DAY_S)
async def export(payload: Export, ctx: Context) -> Exported:
    """Collect a customer's rows, and say how far it is."""
    file = io.StringIO()
    writer = csv.writer(file)
    for row in range(payload.rows):
        await asyncio.sleep(payload.seconds_a_row)  # a cancellation arrives here
        writer.writerow([payload.customer, row])
        await ctx.progress((row + 1) / payload.rows, f"row {row + 1} of {payload.rows}")
    data = file.getvalue().encode()
    ctx.log.info("exported %d rows", payload.rows)
    return Exported(
        rows=payload.rows, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
    )


@mux.task("customer:welcome", unique=DAY_S)
async def welcome(payload: Signup, ctx: Context) -> None:
    """Greet somebody, once a day at most."""
    ctx.log.info("welcome, %s", payload.email)
