"""Deals free places to queues by weight."""

from __future__ import annotations

from typing import Final

from asyncq.server.in_flight import Lane

PARCELS: Final = 8  # in which places are dealt: one by one, each of many queues costs a call


def dealt(places: int, rooms: dict[Lane, int]) -> dict[Lane, int]:
    """Deal places to lanes, each parcel to the one that has had the least for its weight.

    `rooms`: how many a lane may take. A lane that was empty joins at the level of the others.
    """
    level = min((lane.turn for lane in rooms if not lane.rejoins), default=0.0)
    for lane in rooms:
        if lane.rejoins:  # it was empty: no debts, and nothing to catch up
            lane.turn = level
            lane.rejoins = False
    turns = {lane: lane.turn for lane in rooms}
    wants = dict.fromkeys(rooms, 0)
    parcel = -(-places // PARCELS)  # rounded up
    while places > 0 and turns:
        lane = min(turns, key=turns.__getitem__)
        taken = min(parcel, places, rooms[lane] - wants[lane])
        places -= taken
        wants[lane] += taken
        turns[lane] += taken / lane.weight
        if wants[lane] == rooms[lane]:
            del turns[lane]
    return wants
