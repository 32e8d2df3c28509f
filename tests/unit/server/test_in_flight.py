"""What runs here, what waits to be saved, and when a queue is asked again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asyncq import LeaseExpiredError
from asyncq.message import TaskMessage
from asyncq.outcome import DONE
from asyncq.server.in_flight import LONGEST_SPREAD, InFlight, Lane, Run


def in_flight(**options: Any) -> InFlight:
    async def annotate(queue: str, task_id: str, mark: int, name: str, value: bytes) -> bool:
        return mark == 1

    return InFlight({"high": 6, "low": 1}, 10, annotate, **options)


def run_of(lane: Lane, task_id: str = "a", mark: int = 1) -> Run:
    run = Run(lane, TaskMessage(id=task_id, queue=lane.queue), mark)
    lane.in_flight.add(run)
    return run


async def test_a_run_takes_a_place_until_it_ends() -> None:
    world = in_flight()
    run = run_of(world.lanes["low"])
    assert (world.running, world.free) == (1, 9)
    world.end(run, DONE)
    assert (world.running, world.free, world.unsaved()) == (0, 10, 1)


async def test_the_second_end_of_a_run_changes_nothing() -> None:
    world = in_flight()
    run = run_of(world.lanes["low"])
    world.end(run, DONE)
    world.end(run, DONE)
    assert (world.running, world.free, world.unsaved()) == (0, 10, 1)


async def test_the_end_of_a_written_off_run_leaves_its_successor_alone() -> None:
    world = in_flight()
    lane = world.lanes["low"]
    first = run_of(lane)
    world.end(first, None)
    second = run_of(lane, mark=2)
    world.end(first, DONE)
    assert world.find("a") == [second]
    assert (world.running, world.unsaved()) == (1, 0)


async def test_ids_are_found_in_every_queue() -> None:
    world = in_flight()
    runs = [run_of(world.lanes["high"]), run_of(world.lanes["low"])]
    assert world.find("a") == runs
    assert world.find("b") == []


async def test_several_may_wait_until_nothing_runs() -> None:
    world = in_flight()
    run = run_of(world.lanes["low"])
    async with asyncio.timeout(2), asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(world.idle())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        world.end(run, None)


async def test_waiting_goes_on_when_a_new_run_begins_at_once() -> None:
    world = in_flight()
    lane = world.lanes["low"]
    first = run_of(lane)
    idle = asyncio.create_task(world.idle())
    await asyncio.sleep(0)
    world.end(first, None)
    second = run_of(lane)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not idle.done()
    world.end(second, None)
    async with asyncio.timeout(2):
        await idle


async def test_a_limited_queue_has_room_for_its_limit() -> None:
    world = in_flight(limits={"low": 2})
    lane = world.lanes["low"]
    assert [lane.room(places) for places in (0, 1, 5)] == [0, 1, 2]
    run_of(lane, "a")
    run_of(lane, "b")
    run_of(lane, "c")  # one more than it should
    assert lane.room(5) == 0
    assert world.lanes["high"].room(5) == 5


async def test_a_queue_that_gave_less_than_asked_is_empty_until_it_is_woken() -> None:
    world = in_flight()
    lane = world.lanes["low"]
    lane.found(3, 5, now=100.0)
    assert lane.empty
    assert not lane.armed
    assert world.unarmed.is_set()
    lane.wake()
    assert not lane.empty
    assert world.changed.is_set()


async def test_a_queue_that_gave_all_that_was_asked_is_asked_again() -> None:
    lane = in_flight().lanes["low"]
    lane.found(5, 5, now=100.0)
    assert not lane.empty


async def test_fruitless_wake_ups_spread_and_a_task_ends_that() -> None:
    lane = in_flight().lanes["low"]
    for _ in range(LONGEST_SPREAD + 3):
        lane.wake()
        lane.found(0, 5, now=100.0)
        assert 100.0 <= lane.arm_at <= 100.0 + 2**LONGEST_SPREAD / 1000
    assert lane.fruitless == LONGEST_SPREAD
    lane.wake()
    lane.found(1, 5, now=100.0)
    assert lane.fruitless == 0
    assert lane.arm_at == 100.0


async def test_writing_for_a_lost_lease_raises() -> None:
    lane = in_flight().lanes["low"]
    await run_of(lane, mark=1).write_result(b"x")
    with pytest.raises(LeaseExpiredError):
        await run_of(lane, mark=2).write_progress(0.5, "")


async def test_lease_lost_is_set_even_for_who_asks_late() -> None:
    run = run_of(in_flight().lanes["low"])
    run.task = asyncio.create_task(asyncio.sleep(10))
    run.cancel("lease lost")
    assert run.lease_lost.is_set()
    run.task.cancel()
