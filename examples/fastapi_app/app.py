"""A web API whose slow work is done elsewhere: routes enqueue jobs and look after them.

uvicorn examples.fastapi_app.app:app
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from asyncq import (
    BrokerUnavailableError,
    Client,
    DuplicateTaskError,
    TaskFailedError,
    TaskHandle,
    TaskNotFoundError,
    TaskState,
)
from examples.fastapi_app.jobs import Export, Exported, Signup, export, mux, welcome

WELCOME_IN_S = 60


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, Client]]:
    """Keep one client as long as the app lives; `bind` lets jobs be enqueued without naming it."""
    async with Client() as client:
        mux.bind(client)
        yield {"client": client}


app = FastAPI(title="Exports", lifespan=lifespan)


@app.exception_handler(BrokerUnavailableError)
async def unavailable(request: Request, error: Exception) -> JSONResponse:
    """Tell that Redis is away: the request may be made again."""
    return JSONResponse({"detail": str(error)}, status_code=503, headers={"Retry-After": "5"})


@app.exception_handler(TaskNotFoundError)
async def not_found(request: Request, error: Exception) -> JSONResponse:
    """Tell that there is no such job, or not any more."""
    return JSONResponse({"detail": "no such export"}, status_code=404)


def handle_of(id: str, request: Request) -> TaskHandle[Exported]:
    """Find the job that a path names."""
    client: Client = request.state.client
    return client.handle(id, of=export)


Job = Annotated[TaskHandle[Exported], Depends(handle_of)]


class Accepted(BaseModel):
    """A job that waits to be done."""

    id: str


class Status(BaseModel):
    """How a job is doing."""

    state: TaskState
    progress: float
    note: str
    failures: int
    error: str


@app.post("/exports", status_code=202)
async def start_export(wanted: Export) -> Accepted:
    """Start an export."""
    job = await export.enqueue(wanted)
    return Accepted(id=job.id)


@app.get("/exports/{id}")
async def show_export(job: Job) -> Status:
    """Tell how an export is doing."""
    info = await job.info()
    fraction, note = info.progress or (0.0, "")
    return Status(
        state=info.state,
        progress=fraction,
        note=note,
        failures=info.retried,
        error=info.last_error,
    )


@app.get("/exports/{id}/result", responses={202: {"description": "not done yet"}})
async def export_result(
    job: Job, response: Response, wait: Annotated[float, Query(gt=0, le=30)] = 1
) -> Exported | None:
    """Give the result of an export, or wait for it, up to `wait` seconds."""
    try:
        return await job.result(timeout=wait)
    except TimeoutError:
        response.status_code = 202
        return None
    except TaskFailedError as failure:
        raise HTTPException(409, f"the export failed: {failure.error}") from failure


@app.delete("/exports/{id}", status_code=202)
async def cancel_export(job: Job) -> Accepted:
    """Cancel an export that is running; it is not tried again."""
    info = await job.info()
    if info.state != TaskState.ACTIVE:
        raise HTTPException(409, f"the export is not running, it is {info.state}")
    await job.cancel(retry=False)
    return Accepted(id=job.id)


@app.post("/signups", status_code=202)
async def sign_up(signup: Signup) -> Accepted:
    """Greet somebody new in a minute; who signs up twice is greeted once."""
    try:
        job = await welcome.enqueue(signup, process_in=WELCOME_IN_S)
    except DuplicateTaskError as duplicate:
        raise HTTPException(409, f"already signed up: {duplicate.holder_id}") from duplicate
    return Accepted(id=job.id)
