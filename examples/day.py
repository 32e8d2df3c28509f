"""A day of the shop, seen from the side that enqueues: what it asks for, and what must come of it.

The worker's side is examples/shop.py. `examples.demo` brings the two together.
"""

from __future__ import annotations

import asyncio
import csv
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from asyncq import Client, DuplicateTaskError, TaskHandle, TaskInfo, TaskState
from asyncq.inspector import Inspector, QueueInfo
from examples.shop import (
    CHARGE,
    Mail,
    Order,
    Product,
    Receipt,
    Report,
    Sent,
    euros,
    print_label,
    receipt_id,
    report_day,
    send_mail,
)

REMINDER_IN = timedelta(seconds=2)
REPORT_IN = timedelta(seconds=0.5)
LOOK_S = 0.1  # between two looks at queues whose tasks leave nothing to wait for

FIRST_PRODUCT = 400_000_000_000


@dataclass
class Day:
    """What was asked of the worker, and what it answered."""

    orders: list[Order]
    charges: list[TaskHandle[Receipt]]
    answers: list[Receipt | BaseException]
    labels: int
    reminder_due: datetime
    reminder: Sent
    report: Report
    report_id: str
    refused_for: str
    """The task because of which a second report was refused; empty: it was not refused."""

    @property
    def charged(self) -> list[Order]:
        """The orders that can be charged."""
        return [order for order in self.orders if not order.stolen_card]


@dataclass
class Check:
    """One thing that was expected, beside what was found."""

    what: str
    expected: str
    found: str
    note: str = ""

    @property
    def is_right(self) -> bool:
        """Whether they are the same."""
        return self.expected == self.found


def goals(orders: list[Order], labels: int) -> dict[str, int]:
    """Return how many tasks each queue will have ended when the day is over."""
    receipts = sum(not order.stolen_card for order in orders)
    return {"critical": len(orders), "default": receipts + 2, "low": labels}


async def run_day(client: Client, inspector: Inspector, orders: list[Order], labels: int) -> Day:
    """Enqueue a day's work, and wait until it is done."""
    reminder_due = datetime.now(UTC) + REMINDER_IN
    reminder = await client.enqueue(
        send_mail.new(
            Mail(to="team@mail.example", subject="Close the shop", text="It is time."),
            process_at=reminder_due,
        )
    )
    charges = await asyncio.gather(
        *(
            client.enqueue(
                CHARGE.new(order, task_id=order.id), headers={"request-id": f"web-{order.id}"}
            )
            for order in orders
        )
    )
    await client.enqueue_many(
        print_label.new(Product(number=FIRST_PRODUCT + n, cents=95 + n % 900))
        for n in range(labels)
    )
    answers = await asyncio.gather(*(one.result() for one in charges), return_exceptions=True)

    report = await client.enqueue(report_day.new(process_in=REPORT_IN))
    refused_for = ""
    try:
        await client.enqueue(report_day.new())
    except DuplicateTaskError as error:  # the first one is unique until it is done
        refused_for = error.holder_id

    day = Day(
        orders=orders,
        charges=charges,
        answers=answers,
        labels=labels,
        reminder_due=reminder_due,
        reminder=await reminder.result(),
        report=await report.result(),
        report_id=report.id,
        refused_for=refused_for,
    )
    await all_ended(inspector)
    return day


async def all_ended(inspector: Inspector) -> None:
    """Wait until no queue has work left: labels keep no result that could be awaited."""
    while True:
        if not any(map(left, await inspector.queue_infos())):
            return
        await asyncio.sleep(LOOK_S)


def left(queue: QueueInfo) -> int:
    """Return how many tasks of a queue have not ended."""
    return queue.pending + queue.active + queue.scheduled + queue.retry


def ended(queue: QueueInfo) -> int:
    """Return how many tasks of a queue succeeded, or failed for good."""
    return queue.processed_total - queue.failed_total + queue.archived


# What must have come of it


async def check_store(client: Client, inspector: Inspector, day: Day) -> list[Check]:
    """Read everything back from the store."""
    queues = {queue.queue: queue for queue in await inspector.queue_infos()}
    orders = await infos(day.charges)
    mails = await infos(client.handle(receipt_id(order), of=send_mail) for order in day.charged)
    return [
        *check_orders(day, orders),
        *check_mails(day, mails),
        *check_report(day),
        *check_counters(day, queues),
    ]


def check_orders(day: Day, orders: list[TaskInfo]) -> list[Check]:
    """Judge the states and the results of the orders."""
    busy = [order.bank_busy for order in day.charged if order.bank_busy]
    total = sum(order.total_cents for order in day.charged)
    done = [task for task in orders if task.state == TaskState.COMPLETED]
    retried = [task.retried for task in done if task.retried]
    archived = [task for task in orders if task.state == TaskState.ARCHIVED]
    receipts = [one for one in day.answers if isinstance(one, Receipt)]
    return [
        Check("orders charged at once", f"{len(day.charged) - len(busy)}",
              f"{len(done) - len(retried)}"),
        Check("charged later: the bank was busy", f"{len(busy)}, {sum(busy)} retries",
              f"{len(retried)}, {sum(retried)} retries"),
        Check("archived: the card is stolen", f"{len(day.orders) - len(day.charged)}",
              f"{sum('stolen' in task.last_error for task in archived)}"),
        Check("receipts, as results", f"{len(day.charged)}, {euros(total)}",
              f"{len(receipts)}, {euros(sum(one.total_cents for one in receipts))}"),
    ]  # fmt: skip


def check_mails(day: Day, mails: list[TaskInfo]) -> list[Check]:
    """Judge the receipts that orders have mailed, and the mail that was scheduled."""
    sent = [task for task in mails if task.state == TaskState.COMPLETED]
    late_s = (day.reminder.at - day.reminder_due).total_seconds()
    return [
        Check("receipts mailed", f"{len(day.charged)}, {slow_mails(day)} retries",
              f"{len(sent)}, {sum(task.retried for task in sent)} retries"),
        Check("reminder, scheduled", "after it was due", f"{'after' if late_s >= 0 else 'before'} "
              "it was due", note=f"by {late_s * 1000:.0f} ms"),
    ]  # fmt: skip


def check_report(day: Day) -> list[Check]:
    """Judge the report, which was asked for twice."""
    total = sum(order.total_cents for order in day.charged)
    refused = day.refused_for == day.report_id
    return [
        Check("report, asked for twice", "done once", "done once" if refused else "not refused"),
        Check("its sum of all invoices", f"{len(day.charged)}, {euros(total)}",
              f"{day.report.invoices}, {euros(day.report.total_cents)}"),
    ]  # fmt: skip


def check_counters(day: Day, queues: dict[str, QueueInfo]) -> list[Check]:
    """Judge what the queues have counted: every run, those that failed too."""
    busy = sum(order.bank_busy for order in day.charged)
    failures = {
        "critical": busy + len(day.orders) - len(day.charged),
        "default": slow_mails(day),
        "low": 0,
    }
    runs = {
        "critical": len(day.orders) + busy,
        "default": len(day.charged) + slow_mails(day) + 2,
        "low": day.labels,
    }
    return [
        *(
            Check(f"runs on queue {name}", f"{runs[name]:,}, {failures[name]} failed",
                  f"{queues[name].processed_total:,}, {queues[name].failed_total} failed")
            for name in runs
        ),
        Check("tasks left over", "0", f"{sum(map(left, queues.values()))}"),
    ]  # fmt: skip


def check_files(shop: Path, day: Day) -> list[Check]:
    """Count what the handlers have written, once the worker has closed its files."""
    with (shop / "labels.csv").open(newline="") as labels:
        printed = {code for code, _ in csv.reader(labels)}
    invoices, mails = list((shop / "invoices").iterdir()), list((shop / "outbox").iterdir())
    return [
        Check("invoices and mails, as files", f"{len(day.charged)}, {len(day.charged) + 1}",
              f"{len(invoices)}, {len(mails)}"),
        Check("labels, as lines of a file", f"{day.labels:,}", f"{len(printed):,}"),
    ]  # fmt: skip


def slow_mails(day: Day) -> int:
    """Return how many receipts go to the mail server that fails at first."""
    return sum(order.email.endswith("@slow.example") for order in day.charged)


async def infos(handles: Iterable[TaskHandle[Any]]) -> list[TaskInfo]:
    """Look many tasks up at once."""
    return await asyncio.gather(*(handle.info() for handle in handles))
