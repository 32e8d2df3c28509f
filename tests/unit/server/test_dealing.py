"""How free places are dealt to queues."""

from __future__ import annotations

from asyncq.server.dealing import PARCELS, dealt
from asyncq.server.in_flight import InFlight, Lane


def lanes(**weights: int) -> list[Lane]:
    async def annotate(queue: str, task_id: str, mark: int, name: str, value: bytes) -> bool:
        return True

    return list(InFlight(weights, 10, annotate).lanes.values())


def test_places_are_dealt_by_weight() -> None:
    high, low = lanes(high=3, low=1)
    assert dealt(80, {high: 80, low: 80}) == {high: 60, low: 20}


def test_a_lane_gets_no_more_than_it_may_take_and_the_others_the_rest() -> None:
    small, large = lanes(small=9, large=1)
    assert dealt(80, {small: 5, large: 80}) == {small: 5, large: 75}
    assert dealt(80, {small: 5, large: 6}) == {small: 5, large: 6}


def test_a_single_place_goes_to_the_lane_that_had_the_least() -> None:
    served, waiting = lanes(served=1, waiting=1)
    served.turn = 10
    assert dealt(1, {served: 1, waiting: 1}) == {served: 0, waiting: 1}


def test_a_lane_that_was_empty_has_nothing_to_catch_up() -> None:
    served, back = lanes(served=1, back=1)
    served.turn, back.rejoins = 1000, True
    assert dealt(80, {served: 80, back: 80}) == {served: 40, back: 40}
    assert back.turn == 1000


def test_more_lanes_than_parcels_get_some_in_turn() -> None:
    many = lanes(**{f"q{i}": 1 for i in range(2 * PARCELS)})
    wants = dealt(10 * PARCELS, dict.fromkeys(many, 100))
    assert sorted(wants.values()) == [0] * PARCELS + [10] * PARCELS
