"""Reads golden files: what Go Asynq left in Redis, and what of it differs from run to run."""

from __future__ import annotations

import json
import tomllib
from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.golden.calls import ERRORS
from tests.golden.state import Key, State, Stored, decoded

FOLDER = Path(__file__).parent

SERVER = {"servers score", "workers score", "started", "deadline"}
LEASE = {"lease score"}
SCORES = {
    f"{name} score"
    for name in ("scheduled", "retry", "archived", "completed", "group", "aggregation_sets")
}
DAYS: set[str] = set()  # day keys have a common name, and a TTL is always taken as remaining time
IDS: set[str] = set()  # random ids have a common name

VOLATILE: dict[str, set[str]] = {
    "aggregation set id (UUID), scores, hash field pending_since (unix nanoseconds at enqueue)": {
        "pending_since",
        *SCORES,
    },
    "archived score": {"archived score"},
    "archived scores": {"archived score"},
    "completed score = completed_at + retention": {"completed score"},
    "date in the processed:/failed: key names, and their TTL": DAYS,
    "entry ids, scheduler id, next and prev times, enqueue times, task ids": IDS,
    "group score": {"group score"},
    "hash field pending_since (unix nanoseconds at enqueue)": {"pending_since"},
    "hash field pending_since (unix nanoseconds at enqueue), if present": {"pending_since"},
    "host, pid, server id, times; lease score = last extension + 30 s": SERVER | LEASE,
    "lease score": LEASE,
    "lease score in the snapshot": LEASE,
    "lease score, server keys": SERVER | LEASE,
    "lock TTL": set(),
    "locks of the members stay until their TTL": set(),
    "message completed_at": {"completed_at"},
    "message last_failed_at": {"last_failed_at"},
    "message last_failed_at and the file:line in error_msg": {"last_failed_at"},
    "retry score": {"retry score"},
    "score of the group member (unix seconds at enqueue)": {"group score"},
    "score of the scheduled member": {"scheduled score"},
    "scores of the group members": {"group score"},
    "scores, last_failed_at, completed_at, lock TTLs": {"last_failed_at", "completed_at", *SCORES},
    "task id (random UUID v4): in the key name, the list or set and the message": IDS,
    "value of the paused key": {"paused"},
    "value of the paused key (unix seconds)": {"paused"},
    "value of the paused keys (unix seconds)": {"paused"},
}
"""Each text that a golden file calls volatile, as the kinds of facts it excuses (`compare.py`).

Excused from being equal: as times they still have to fit the time of the run.
"""

IN_SNAPSHOTS = SERVER | LEASE | {"pending_since"}
"""Volatile in every snapshot, though most files name only what is volatile at the end."""

RANDOM_IDS = {text for text in VOLATILE if text.startswith("task id (random")}


@dataclass
class Run:
    """What a run of a scenario did and left; `calls` are (call, what came of it) in order."""

    calls: list[tuple[str, Any]]
    final: State
    snapshots: dict[str, State]


@dataclass
class Golden:
    """A golden file: a run of Go Asynq, and which kinds of facts are volatile in it."""

    name: str
    run: Run
    volatile: set[str]
    random_ids: bool

    @property
    def states(self) -> list[State]:
        """The snapshots and the final state."""
        return [*self.run.snapshots.values(), self.run.final]


@dataclass(frozen=True)
class Coverage:
    """Which scenarios are held by the tests, with their differences, and which are left why."""

    covered: dict[str, list[str]]
    later: dict[str, str]


def coverage() -> Coverage:
    """Read `coverage.toml`."""
    tables = tomllib.loads((FOLDER / "coverage.toml").read_text("utf-8"))
    return Coverage(tables["covered"], tables["later"])


def read(name: str) -> Any:
    """Read one of the files as it is."""
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def scenarios() -> list[str]:
    """The names of all scenarios."""
    return [entry["scenario"] for entry in read("_index")]


def load(name: str) -> Golden:
    """Read the file of a scenario; a volatile text that is not in the table is an error."""
    record = read(name)
    unknown = set(record["volatile"]) - VOLATILE.keys()
    assert not unknown, f"{name}: say in VOLATILE what these excuse: {sorted(unknown)}"
    began = record["started_at_unix"]
    run = Run(
        calls=[(call["call"], _outcome(call)) for call in record["calls"] or []],
        final=State(_keys(record["keys"]), began, record["dumped_at_unix"]),
        snapshots={
            shot["label"]: State(_keys(shot["keys"]), began, shot["taken_at_unix"])
            for shot in record.get("snapshots") or []
        },
    )
    volatile = {kind for text in record["volatile"] for kind in VOLATILE[text]}
    return Golden(name, run, volatile, bool(RANDOM_IDS & set(record["volatile"])))


def _outcome(call: dict[str, Any]) -> Any:
    """What came of a call; an error of the client is named by ours for it."""
    if "error" not in call:
        return call.get("result")
    error = ERRORS.get(call["error"])
    return {"error": call["error"] if error is None else error.__name__}


def _keys(records: list[dict[str, Any]]) -> dict[str, Key]:
    return {record["key"]: _key(record) for record in records}


def _key(record: dict[str, Any]) -> Key:
    key, kind, ttl_ms = record["key"], record["type"], record["ttl_ms"]
    value = record[kind]
    match kind:
        case "zset":
            return Key(kind, ttl_ms, {_text(m["member"]): float(m["score"]) for m in value})
        case "hash":
            return Key(kind, ttl_ms, {name: _stored(key, name, v) for name, v in value.items()})
        case "list" | "set":
            return Key(kind, ttl_ms, [_stored(key, None, item) for item in value])
        case _:
            return Key(kind, ttl_ms, _stored(key, None, value))


def _text(value: dict[str, Any]) -> str:
    return b64decode(value["b64"]).decode("utf-8", "backslashreplace")


def _stored(key: str, name: str | None, value: dict[str, Any]) -> Stored:
    return decoded(key, name, b64decode(value["b64"]))
