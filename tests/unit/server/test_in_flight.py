"""What runs here, what waits to be saved, and when a queue is asked again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asyncq import LeaseExpiredError
from asyncq.message import TaskMessage
from asyncq.outcome import DONE, REQUEUE
from asyncq.server.in_flight import (
    CANCELED,
    DEADLINE,
    LEASE_LOST,
    LONGEST_SPREAD_S,
    PATIENCE,
    SPREAD_S,
    TO_OTHERS_S,
    InFlight,
    Lane,
    Run,
)


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


async def test_a_queue_that_gave_all_it_had_is_empty_until_it_is_woken() -> None:
    world = in_flight()
    lane = world.lanes["low"]
    lane.found(3, 5, now=100.0)
    assert lane.empty
    assert not lane.armed
    assert world.unarmed.is_set()
    lane.wake()
    assert not lane.empty
    assert world.changed.is_set()


async def test_a_queue_with_more_than_it_gave_is_asked_again() -> None:
    lane = in_flight().lanes["low"]
    lane.found(5, 5, now=100.0, more=True)
    assert not lane.empty
    lane.found(5, 5, now=100.0)
    assert lane.empty
    lane.found(1, 1, now=100.0, more=True)
    assert not lane.empty


async def test_an_empty_lane_is_armed_unless_a_request_waits_in_redis() -> None:
    lane = in_flight().lanes["low"]
    assert not lane.is_to_be_armed()
    lane.found(0, 5, now=100.0)
    assert lane.is_to_be_armed()
    lane.awaited = True
    assert not lane.is_to_be_armed()
    lane.armed = True  # still, from before
    lane.tell(100.0)
    assert lane.empty  # it gets the task without asking


async def test_a_lane_that_will_be_awaited_is_armed_while_something_runs() -> None:
    lane = in_flight().lanes["low"]
    lane.awaitable = True
    lane.found(0, 5, now=100.0)
    assert not lane.is_to_be_armed()
    run = run_of(lane)
    assert lane.is_to_be_armed()
    lane.in_flight.end(run, DONE)
    assert not lane.is_to_be_armed()


def in_doubt(*, servers: int = 2) -> Lane:
    """A lane that has asked in vain as often as it takes to leave new tasks to others."""
    world = in_flight()
    world.servers = servers
    lane = world.lanes["low"]
    lane.found(0, 5, now=99.0)
    for _ in range(PATIENCE):
        assert asks_when_told(lane)
        lane.found(0, 5, now=99.0)
    return lane


def asks_when_told(lane: Lane, now: float = 100.0) -> bool:
    lane.armed = True
    lane.in_flight.unarmed.clear()
    lane.tell(now)
    assert lane.empty == lane.in_flight.unarmed.is_set()  # it asks, or it is to be looked at
    return not lane.empty


async def test_a_lane_that_asked_in_vain_looks_before_it_asks_until_it_gets_a_task() -> None:
    lane = in_doubt()
    assert not asks_when_told(lane)
    lane.looked([b"a", b"b"], now=100.0)
    assert not lane.empty
    lane.found(1, 5, now=100.0)
    assert lane.arm_at == 100.0
    assert asks_when_told(lane)


async def test_a_new_task_is_left_to_others_for_a_moment() -> None:
    lane = in_doubt()
    lane.looked([b"a"], now=100.0)
    assert lane.empty
    assert not lane.armed
    assert lane.arm_at == 100.0 + TO_OTHERS_S
    lane.looked([b"a"], now=lane.arm_at)  # nobody took it
    assert not lane.empty


async def test_while_others_take_what_comes_a_lane_pauses_and_looks_again() -> None:
    lane = in_doubt()
    for _ in range(3):
        lane.looked([b"a"], now=100.0)
        lane.looked([b"b"], now=100.0)
        assert lane.empty
        assert not lane.armed
        assert 100.0 <= lane.arm_at <= 100.0 + 2 * SPREAD_S


async def test_the_pause_after_a_look_in_vain_grows_with_the_servers_up_to_a_bound() -> None:
    longest: list[float] = []
    for servers in (1, 10, 10_000):
        pauses: list[float] = []
        for _ in range(200):
            lane = in_doubt(servers=servers)
            asks_when_told(lane)
            lane.armed = True
            lane.looked([], now=100.0)
            assert lane.armed  # so a change is told meanwhile, and looked at when it is over
            pauses.append(lane.arm_at - 100.0)
            lane.tell(100.0)
            assert lane.arm_at - 100.0 >= pauses[-1]
        longest.append(max(pauses))
    assert longest[0] <= SPREAD_S < longest[1] <= 10 * SPREAD_S < longest[2] <= LONGEST_SPREAD_S


async def test_an_old_change_wakes_nobody() -> None:
    """Such as that of a fetch of our own, told when the next look is on its way already."""
    lane = in_flight().lanes["low"]
    lane.found(1, 5, now=100.0)
    lane.tell(100.0)
    assert lane.empty
    lane.found(0, 5, now=100.0)
    assert lane.fruitless == 0


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


# Tasks that were taken ahead


def ahead(**options: Any) -> tuple[InFlight, list[Run]]:
    """Ten places taken, and three runs that wait: "low" a, "high" b, "low" c."""
    world = in_flight(prefetch=3, **options)
    for i in range(10):
        run_of(world.lanes["high"], f"r{i}")
    lanes = ("low", "high", "low")
    return world, [run_of(world.lanes[lane], i) for lane, i in zip(lanes, "abc", strict=True)]


async def test_more_tasks_than_places_wait() -> None:
    world = in_flight(prefetch=3)
    assert world.free == 13
    world, waiting = ahead()
    assert [run.waits for run in world.runs()] == [False] * 10 + [True, True, True]
    assert (world.running, world.free) == (10, 0)
    assert list(world.waiting) == waiting
    assert world.next_waiting() is None


async def test_a_free_place_is_for_the_first_that_waits_whatever_its_queue() -> None:
    world, waiting = ahead()
    for run in (world.lanes["high"].runs["r3"], world.lanes["high"].runs["r7"]):
        world.end(run, DONE)
    assert world.free == 2
    assert [world.next_waiting(), world.next_waiting(), world.next_waiting()] == [
        *waiting[:2],
        None,
    ]
    assert [run.waits for run in waiting] == [False, False, True]
    assert (world.running, world.free) == (10, 2)


async def test_the_end_of_what_waits_gives_no_place_back() -> None:
    world, waiting = ahead()
    world.end(waiting[1], REQUEUE)
    world.end(waiting[1], REQUEUE)
    assert (world.running, world.free, world.unsaved()) == (10, 1, 1)
    assert list(world.waiting) == [waiting[0], waiting[2]]
    assert world.find("b") == []
    assert world.changed.is_set()


async def test_what_waits_is_found_and_counts_for_the_limit_of_its_queue() -> None:
    world, waiting = ahead(limits={"low": 3})
    assert world.find("a") == [waiting[0]]
    assert world.lanes["low"].room(5) == 1
    world.end(waiting[0], None)
    assert world.lanes["low"].room(5) == 2


async def test_what_waits_is_cancelled_when_it_is_to_begin() -> None:
    _, (first, *_) = ahead()
    first.cancel(CANCELED)
    first.cancel(DEADLINE)
    assert first.cancel_reason == CANCELED
    first.cancel(LEASE_LOST)
    assert first.cancel_reason == LEASE_LOST
    assert first.lease_lost.is_set()
    assert (first.task, first.over) == (None, False)


async def test_a_run_that_is_over_is_not_cancelled() -> None:
    world = in_flight()
    run = run_of(world.lanes["low"])
    task = run.task = asyncio.create_task(asyncio.Event().wait())
    world.end(run, DONE)
    run.cancel(LEASE_LOST)
    assert run.cancel_reason is None
    assert not task.cancelling()
    task.cancel()


async def test_from_a_thread_that_outlives_its_run_nothing_is_written() -> None:
    world = in_flight()
    run = run_of(world.lanes["low"])
    world.end(run, None)
    with pytest.raises(LeaseExpiredError):
        await asyncio.to_thread(run.sync_call, run.write_progress, 0.5, "late")


async def test_nothing_runs_although_something_waits() -> None:
    """As for a moment between the end of the last and the start of the next."""
    world = in_flight(prefetch=1)
    runs = [run_of(world.lanes["low"], str(i)) for i in range(11)]
    idle = asyncio.create_task(world.idle())
    await asyncio.sleep(0)
    for run in runs[:10]:
        world.end(run, None)
    assert world.next_waiting() is runs[10]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not idle.done()
    world.end(runs[10], None)
    async with asyncio.timeout(2):
        await idle
