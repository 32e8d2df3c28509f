"""Tells where two runs differ: exact where the golden file is exact, in time where it is volatile.

A time is compared by what it says about its run: an instant by its distance from the moments
between the run's beginning and its end, a TTL by what it may have been when it was set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final, NamedTuple

from tests.golden.files import IN_SNAPSHOTS, Golden, Run
from tests.golden.state import Key, State, Stored, anonymous

MARKS: Final = 2**20
TTL_SLACK_MS: Final = 1000  # whole seconds are cut
SLACK_S: Final = 0.001  # of instants that are not cut, since `due` counts in milliseconds

SCORED = re.compile(
    r"asynq:(?:\{.*\}:)?(?P<set>scheduled|retry|archived|completed|lease|aggregation_sets"
    r"|servers|workers|g:.*)"
)


class Fact(NamedTuple):
    """One thing that a state says; `kind` tells how it is compared."""

    kind: str
    value: Any


def differences(golden: Golden, ours: Run) -> list[str]:
    """Say where our run differs from the golden one; nothing where it does not."""
    found = _call_differences(golden, ours)
    expected = golden.run
    if ours.snapshots.keys() != expected.snapshots.keys():
        found.append(f"snapshots: {list(expected.snapshots)}, ours: {list(ours.snapshots)}")
    for label in expected.snapshots.keys() & ours.snapshots.keys():
        told = _state_differences(
            golden, expected.snapshots[label], ours.snapshots[label], golden.volatile | IN_SNAPSHOTS
        )
        found += [f"in the snapshot {label!r}: {difference}" for difference in told]
    return found + _state_differences(golden, expected.final, ours.final, golden.volatile)


def _call_differences(golden: Golden, ours: Run) -> list[str]:
    done = [call for call, _ in ours.calls]
    told = [call for call, _ in golden.run.calls]
    if done != told:
        return [f"calls: {told}, ours: {done}"]
    found = []
    for (call, expected), (_, outcome) in zip(golden.run.calls, ours.calls, strict=True):
        found += _differences(
            _call_facts(call, expected, golden.random_ids),
            _call_facts(call, outcome, golden.random_ids),
            golden.run.final,
            ours.final,
            {"scheduled score"},
        )
    return found


def _state_differences(
    golden: Golden, expected: State, ours: State, volatile: set[str]
) -> list[str]:
    expected = anonymous(expected, random_ids=golden.random_ids)
    ours = anonymous(ours, random_ids=golden.random_ids)
    return _differences(facts(expected), facts(ours), expected, ours, volatile)


def _differences(
    expected: dict[str, Fact], ours: dict[str, Fact], golden: State, our: State, volatile: set[str]
) -> list[str]:
    found = []
    for path in sorted(expected.keys() | ours.keys()):
        theirs, own = expected.get(path), ours.get(path)
        if theirs is None or own is None:
            found.append(f"{path}: {_shown(theirs)}, ours: {_shown(own)}")
        elif not _agree(theirs, own, golden, our, volatile):
            found.append(f"{path} ({theirs.kind}): {theirs.value!r}, ours: {own.value!r}")
    return found


def _shown(fact: Fact | None) -> str:
    return "nothing" if fact is None else repr(fact.value)


# What a state says


def facts(state: State) -> dict[str, Fact]:
    """Return everything that a state says, one thing an entry."""
    return {path: fact for key, stored in state.keys.items() for path, fact in _of_key(key, stored)}


def _of_key(key: str, stored: Key) -> Iterator[tuple[str, Fact]]:
    yield f"{key} type", Fact("type", stored.type)
    yield f"{key} TTL", Fact("ttl", stored.ttl_ms)
    match stored.type:
        case "zset":
            kind = _kind_of_scores(key)
            for member, score in stored.scores.items():
                yield f"{key} member {member}", Fact(kind, score)
        case "hash":
            for name, value in stored.hash.items():
                yield from _of_value(f"{key} field {name}", name, value)
        case "string" if key.endswith(":paused"):
            yield key, Fact("paused", float(str(stored.value)))
        case "string":
            yield from _of_value(key, "", stored.value)  # type: ignore[arg-type]
        case _:
            yield key, Fact("items", stored.items)


def _kind_of_scores(key: str) -> str:
    match = SCORED.fullmatch(key)
    if match is None:
        return "score"
    return "group score" if match["set"].startswith("g:") else f"{match['set']} score"


def _of_value(path: str, name: str, value: Stored) -> Iterator[tuple[str, Fact]]:
    if isinstance(value, dict):
        for part, content in value.items():
            yield f"{path}.{part}", _of_message(part, content)
    elif name == "pending_since":
        assert re.fullmatch(r"\d{19}", value), f"{value!r} is no time in nanoseconds"
        yield path, Fact("pending_since", int(value) / 1e9)
    else:
        yield path, Fact("value", value)


def _of_message(part: str, content: Any) -> Fact:
    if part in ("last_failed_at", "completed_at"):
        return Fact(part, float(content))
    if isinstance(content, str) and re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", content):
        micros = re.sub(r"(\.\d{6})\d+", r"\1", content)
        kind = "started" if part == "start_time" else part
        return Fact(kind, datetime.fromisoformat(micros).timestamp())
    return Fact("value", content)


def _call_facts(call: str, outcome: Any, random_ids: bool) -> dict[str, Fact]:
    if not isinstance(outcome, dict):
        return {call: Fact("value", outcome)}
    told = dict(outcome)
    if random_ids and "id" in told:
        told["id"] = "<id>"
    at = told.pop("next_process_at_unix", None)
    all_facts = {f"{call} {name}": Fact("value", value) for name, value in told.items()}
    if at is not None and told["state"] == "scheduled":
        all_facts[f"{call} next_process_at"] = Fact("scheduled score", float(at))
    return all_facts


# Whether two facts agree


def _agree(theirs: Fact, own: Fact, golden: State, our: State, volatile: set[str]) -> bool:
    if theirs.kind != own.kind:
        return False
    rule = golden.rules.get(theirs.kind, "cut")
    if theirs.kind == "ttl":
        return _ttls_agree(theirs.value, own.value, golden, our)
    if theirs.value == own.value:
        return True
    if theirs.kind not in volatile:
        return False
    if theirs.kind in ("pending_since", "started", "deadline"):
        return _instants_agree(theirs.value, own.value, golden, our)
    seconds = own.value
    if rule == "marked":
        seconds = math.floor(own.value)
        mark = (own.value - seconds) * MARKS
        if not mark or mark != math.floor(mark):
            return False
    return seconds in _expected_seconds(theirs.value, golden, our, rounded_up=rule == "up")


def _expected_seconds(score: float, golden: State, our: State, *, rounded_up: bool) -> set[int]:
    """What a score would be in our run: at one of its seconds, and as far from it as in theirs."""
    whole = math.ceil if rounded_up else math.floor
    return {
        second + distance
        for second in range(whole(our.began), whole(our.ended + SLACK_S) + 1)
        for distance in range(int(score - golden.ended), int(score - golden.began) + 1)
    }


def _instants_agree(theirs: float, own: float, golden: State, our: State) -> bool:
    golden_ended = golden.ended + 1  # cut, so it may have been almost a second later
    return (
        theirs - golden_ended <= own - our.began + SLACK_S
        and own - our.ended - SLACK_S <= theirs - golden.began
    )


def _ttls_agree(theirs: int, own: int, golden: State, our: State) -> bool:
    """Whether both may have been set to the same; what is left shrinks while the run goes on."""
    if theirs == -1 or own == -1:
        return theirs == own
    theirs_at_most = theirs + (golden.ended + 1 - golden.began) * 1000
    own_at_most = own + (our.ended - our.began) * 1000
    return theirs <= own_at_most + TTL_SLACK_MS and own <= theirs_at_most + TTL_SLACK_MS
