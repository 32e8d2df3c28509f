"""A shop in background tasks: it charges orders, sends mails, prints labels and reports.

    python -m asyncq worker examples.shop:mux --queue critical=6 --queue default=3 --queue low

`python -m examples.demo` runs it on a store of its own. The bank and the mail server are stand-ins
that refuse as the data tells them to; the files in the folder SHOP_FOLDER (default: ./shop) are
real.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from pathlib import Path
from typing import Any, TextIO

import anyio
from pydantic import BaseModel, Field

from asyncq import (
    Context,
    Mux,
    Next,
    Retry,
    SkipRetry,
    Task,
    TaskIDConflictError,
    TaskType,
    exponential,
)

HOUR_S = 3600

# What goes through the queues


class Item(BaseModel):
    """A line of an order."""

    article: str
    quantity: int = Field(gt=0)
    cents: int = Field(ge=0)


class Order(BaseModel):
    """What a customer bought."""

    id: str
    email: str
    items: list[Item]
    stolen_card: bool = False
    bank_busy: int = 0
    """How often the bank asks us to come back."""

    @property
    def total_cents(self) -> int:
        """What it costs."""
        return sum(item.quantity * item.cents for item in self.items)


class Receipt(BaseModel):
    """What came of charging an order."""

    order_id: str
    total_cents: int
    attempts: int


class Mail(BaseModel):
    """A mail to a customer."""

    to: str
    subject: str
    text: str


class Sent(BaseModel):
    """When a mail left."""

    at: datetime


class Product(BaseModel):
    """What a price label is printed for."""

    number: int = Field(ge=0, lt=10**12)
    cents: int


class Report(BaseModel):
    """The day so far."""

    invoices: int
    total_cents: int


# What handlers share while the worker runs


@dataclass
class Shop:
    """The folders and the open file that handlers write to."""

    invoices: Path
    outbox: Path
    labels: TextIO


@asynccontextmanager
async def lifespan(mux: Mux[Shop]) -> AsyncGenerator[Shop]:
    """Open the shop before the first task, and close it after the last."""
    folder = Path(os.environ.get("SHOP_FOLDER", "shop"))
    invoices, outbox = folder / "invoices", folder / "outbox"
    for one in (invoices, outbox):
        one.mkdir(parents=True, exist_ok=True)
    with (folder / "labels.csv").open("a", newline="") as labels:
        yield Shop(invoices, outbox, labels)


mux = Mux(lifespan=lifespan)


@mux.use
async def log_slow_tasks(task: Task, ctx: Context[Shop], call_next: Next) -> Any:
    """Name each task that took longer than a second, and the request that asked for it."""
    started = time.monotonic()
    try:
        return await call_next(task, ctx)
    finally:
        took_s = time.monotonic() - started
        if took_s > 1:
            ctx.log.warning("took %.1f s, for request %s", took_s, ctx.headers.get("request-id"))


# Orders

CHARGE = TaskType(
    "order:charge",
    Order,
    result=Receipt,
    queue="critical",
    max_retry=5,
    timeout=30,
    retention=HOUR_S,
)
"""The contract: a web shop that enqueues orders imports this line, and none of the handlers."""


@mux.task(CHARGE)
async def charge(order: Order, ctx: Context[Shop]) -> Receipt:
    """Charge an order, write its invoice, and let a receipt be mailed."""
    if order.stolen_card:
        raise SkipRetry(f"the card of order {order.id} is stolen")  # asking again will not help
    if ctx.retry_count < order.bank_busy:
        raise Retry(0.25, f"the bank is busy (attempt {ctx.retry_count + 1})")
    await ctx.progress(0.5, "charged")

    # A task may run twice, when its worker dies at the wrong moment. So the invoice has the name
    # of its order, and the mail an id: the second run changes nothing.
    invoice = anyio.Path(ctx.state.invoices / f"{order.id}.txt")
    await invoice.write_text(invoice_text(order))
    with suppress(TaskIDConflictError):
        await send_mail.enqueue(
            Mail(to=order.email, subject=f"Your order {order.id}", text=invoice_text(order)),
            task_id=receipt_id(order),
        )
    return Receipt(order_id=order.id, total_cents=order.total_cents, attempts=ctx.retry_count + 1)


def receipt_id(order: Order) -> str:
    """Return the id of the task that mails the receipt of an order."""
    return f"receipt-{order.id}"


def invoice_text(order: Order) -> str:
    """Write an order out, an item a line and the total at the end."""
    lines = [f"{item.quantity:3} {item.article:<24}{euros(item.cents):>10}" for item in order.items]
    return "\n".join([*lines, f"{'total':<28}{euros(order.total_cents):>10}", ""])


def euros(cents: int) -> str:
    """Write an amount for people."""
    return f"{cents // 100}.{cents % 100:02} €"


# Mails


@mux.task(
    "mail:send",
    retention=HOUR_S,
    retry_delay=exponential(base=0.2, max=60),
)
async def send_mail(mail: Mail, ctx: Context[Shop]) -> Sent:
    """Put a mail into the outbox; the first try at a slow mail server fails."""
    if mail.to.endswith("@slow.example") and ctx.retry_count == 0:
        raise ConnectionError("the mail server says: try again later")  # retried, as any error
    message = EmailMessage()
    message["To"], message["Subject"] = mail.to, mail.subject
    message.set_content(mail.text)
    await anyio.Path(ctx.state.outbox / f"{ctx.task_id}.eml").write_bytes(bytes(message))
    return Sent(at=datetime.now(UTC))


# Labels


@mux.task("label:print", queue="low", max_retry=3, timeout=60)
async def print_label(product: Product, ctx: Context[Shop]) -> None:
    """Add a price label with its bar code to the file of labels."""
    csv.writer(ctx.state.labels).writerow([ean13(product.number), euros(product.cents)])


def ean13(number: int) -> str:
    """Return the digits of a bar code: twelve of the number, and the check digit."""
    digits = f"{number:012}"
    weighted = sum(int(digit) * (1, 3)[i % 2] for i, digit in enumerate(digits))
    return f"{digits}{-weighted % 10}"


# Reports


@mux.task("report:daily", unique=HOUR_S, retention=HOUR_S)
def report_day(ctx: Context[Shop]) -> Report:
    """Add all invoices up. A plain function: it runs in a thread, so it may block."""
    totals = [total_of(invoice) for invoice in ctx.state.invoices.glob("*.txt")]
    ctx.sync.progress(1.0, f"{len(totals)} invoices")
    return Report(invoices=len(totals), total_cents=sum(totals))


def total_of(invoice: Path) -> int:
    """Read the total of an invoice back."""
    amount = invoice.read_text().split()[-2]
    return int(amount.replace(".", ""))
