"""What each intended difference makes of a golden state; the page in docs/ has the reasons.

A scenario declares its differences in `coverage.toml`. Each changes the golden run into what
ours must be, so that nothing else is excused; one that changes nothing is stale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from tests.golden.files import Golden
from tests.golden.state import Key, State

Difference = Callable[[Golden], None]

DIFFERENCES: dict[str, Difference] = {}
"""By the name of its entry in docs/asynq-differences.md."""


def expected(golden: Golden, names: list[str]) -> Golden:
    """Return what our run must be, given the differences that its scenario declares."""
    for name in names:
        before, golden = golden, deepcopy(golden)
        DIFFERENCES[name](golden)
        assert golden != before, f"{golden.name} does not show the difference {name!r}"
    return golden


def difference(name: str) -> Callable[[Difference], Difference]:
    """Register a difference."""

    def register(change: Difference) -> Difference:
        DIFFERENCES[name] = change
        return change

    return register


@difference("whole-seconds")
def _rounded_up(golden: Golden) -> None:
    for state in golden.states:
        for name in ("scheduled", "retry", "completed"):
            shown = any(key.endswith(f"}}:{name}") for key in state.keys)
            if shown and f"{name} score" in golden.volatile:
                state.rules[f"{name} score"] = "up"


@difference("lease-mark")
def _leases_are_marked(golden: Golden) -> None:
    for state in golden.states:
        for key, stored in state.keys.items():
            if key.endswith(":lease"):
                stored.value = {task: end + 1 for task, end in stored.scores.items()}
                state.rules["lease score"] = "marked"


@difference("error-text")
def _errors_name_their_type(golden: Golden) -> None:
    for message in _failed_messages(golden):
        message["error_msg"] = f"RuntimeError: {message['error_msg']}"


@difference("no-panics")
def _a_panic_is_an_exception(golden: Golden) -> None:
    for message in _failed_messages(golden):
        text = message["error_msg"]
        message["error_msg"] = re.sub(r"^panic error .*?\]: ", "RuntimeError: ", text)


@difference("unique-conflict")
def _a_conflict_leaves_no_lock(golden: Golden) -> None:
    keys = golden.run.final.keys
    named = {message.get("unique_key") for _, message in _messages(golden.run.final)}
    for lock in [key for key in keys if ":unique:" in key and key not in named]:
        del keys[lock]


@difference("scheduled-group")
def _a_scheduled_task_reaches_its_group(golden: Golden) -> None:
    state = golden.run.final
    for key, message in list(_messages(state)):
        group, prefix = message.get("group_key"), key.partition("t:")[0]
        if not group:
            continue
        fields = state.keys[key].hash
        fields["group"] = group
        if fields["state"] == "pending":
            fields["state"] = "aggregating"
            del fields["pending_since"]
            del state.keys[f"{prefix}pending"]
            state.keys[f"{prefix}groups"] = Key("set", -1, [group])
            state.keys[f"{prefix}g:{group}"] = Key("zset", -1, {message["id"]: state.ended})
            golden.volatile.add("group score")


@difference("requeued-age")
def _a_requeued_task_has_an_age(golden: Golden) -> None:
    state = golden.run.final
    for key, _ in _messages(state):
        fields = state.keys[key].hash
        if fields["state"] == "pending" and "pending_since" not in fields:
            fields["pending_since"] = f"{int(state.ended)}000000000"


@difference("recovered-at-once")
def _a_recovered_task_is_due_at_once(golden: Golden) -> None:
    for key, stored in golden.run.final.keys.items():
        if key.endswith(":retry"):
            stored.value = dict.fromkeys(stored.scores, float(golden.run.final.ended))


@difference("ghosts")
def _an_id_without_a_task_is_dropped(golden: Golden) -> None:
    keys = golden.run.final.keys
    hashes = [key for key, stored in keys.items() if stored.type == "hash"]
    for key in [key for key in hashes if "msg" not in keys[key].hash]:
        prefix = key.partition("t:")[0]
        for gone in (key, f"{prefix}active", f"{prefix}lease"):
            del keys[gone]


@difference("saved-outcomes")
def _an_outcome_is_saved_once_redis_takes_it(golden: Golden) -> None:
    for state in golden.states:
        for key in [key for key in state.keys if key.startswith("asynq:{")]:
            del state.keys[key]
        state.keys["asynq:{default}:processed"] = Key("string", -1, "1")
        state.keys["asynq:{default}:processed:2026-11-21"] = Key("string", 90 * 86_400_000, "1")
    golden.run.calls[-1] = (golden.run.calls[-1][0], "done")


@difference("queue-listed")
def _each_enqueue_lists_its_queue(golden: Golden) -> None:
    golden.run.final.keys["asynq:queues"] = Key("set", -1, ["default"])
    golden.run.calls[-1] = (golden.run.calls[-1][0], ["default"])


def _messages(state: State) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, stored in state.keys.items():
        if stored.type == "hash" and isinstance(message := stored.hash.get("msg"), dict):
            yield key, message


def _failed_messages(golden: Golden) -> Iterator[dict[str, Any]]:
    for state in golden.states:
        for _, message in _messages(state):
            if "error_msg" in message:
                yield message
