"""A FastAPI app that enqueues: what a user's own code looks like, and that it type-checks."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel

from asyncq import Client, Context, Mux, Next, Retry, Snooze, Task


@dataclass
class Deps:
    session: str


@asynccontextmanager
async def lifespan(mux: Mux[Deps]) -> AsyncGenerator[Deps, None]:
    yield Deps("s")


mux = Mux(lifespan=lifespan)
billing = Mux(prefix="billing:", queue="low")
mux.include(billing)


class Mail(BaseModel):
    user_id: int


class Row(BaseModel):
    n: int


@mux.task("mail", retention=600)
async def mail(payload: Mail, ctx: Context[Deps]) -> str:
    ctx.log.info("x %s", ctx.state.session)
    if ctx.retry_count:
        raise Snooze(3)
    raise Retry(10)


@billing.task("invoice", executor="process", timeout=None)
def invoice(payload: Row, ctx: Context) -> bytes:
    ctx.sync.progress(0.1)
    return b""


@mux.task("nightly", retention=86400)
async def nightly(ctx: Context[Deps]) -> None: ...


@mux.use
async def log(task: Task, ctx: Context, call_next: Next) -> Any:
    return await call_next(task, ctx)


@asynccontextmanager
async def app_lifespan(app: FastAPI) -> AsyncGenerator[dict[str, Client], None]:
    async with Client() as client:
        mux.bind(client)
        yield {"client": client}


app = FastAPI(lifespan=app_lifespan)


def get_client(request: Request) -> Client:
    client: Client = request.state.client
    return client


ClientHere = Annotated[Client, Depends(get_client)]


@app.post("/signup")
async def signup(m: Mail) -> str:
    return (await mail.enqueue(m, process_in=60)).id


@app.post("/bulk")
async def bulk(client: ClientHere) -> int:
    handles = await client.enqueue_many(
        (invoice.new(Row(n=i)) for i in range(5)), return_exceptions=True
    )
    return len(handles)


@app.post("/night")
async def night() -> None:
    await nightly.enqueue(task_id=f"nightly-{date.today()}", process_at=datetime.now(UTC))


@app.delete("/x/{id}")
async def stop(id: str, client: ClientHere) -> None:
    await client.handle(id, of=invoice).cancel()


@app.get("/x/{id}")
async def get(id: str, client: ClientHere) -> str:
    try:
        return await client.handle(id, of=mail).result(timeout=5)
    except TimeoutError:
        raise HTTPException(202) from None
