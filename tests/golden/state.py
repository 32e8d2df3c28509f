"""What stands in a store, as data: every key with its type, its TTL and its value decoded."""

from __future__ import annotations

import re
import time
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from asyncq.proto import asynq_pb2

Connection: TypeAlias = Any
"""A client of redis-py, whose annotations do not tell bytes from text."""

Stored: TypeAlias = str | dict[str, Any]
"""Text, or a decoded message: canonical protobuf JSON by the names of its fields."""

Rule: TypeAlias = Literal["cut", "up", "marked"]
"""How an instant becomes a score of whole seconds: cut, rounded up, or a lease of ours."""

OUR_KEYS = re.compile(r"asyncq:\{.*\}:(due|mark|last:[0-9a-f-]{36}(\.\d)?)")
"""Every key that we write beside Asynq's; one that is not here is a mistake."""

MESSAGES = (
    (re.compile(r"asynq:\{.*\}:t:.*"), "msg", "TaskMessage"),
    (re.compile(r"asynq:servers:\{.*\}"), "", "ServerInfo"),
    (re.compile(r"asynq:workers:\{.*\}"), None, "WorkerInfo"),
)
"""Where messages stand: key, field of a hash (empty: no hash, `None`: every field), and which."""


@dataclass
class Key:
    """One key; a list has its head first, a set is sorted, a zset maps members to scores."""

    type: str
    ttl_ms: int
    value: Stored | list[Stored] | dict[str, float] | dict[str, Stored]

    @property
    def hash(self) -> dict[str, Stored]:
        """The fields of a hash."""
        assert self.type == "hash"
        return self.value  # type: ignore[return-value]

    @property
    def scores(self) -> dict[str, float]:
        """The members of a zset with their scores."""
        assert self.type == "zset"
        return self.value  # type: ignore[return-value]

    @property
    def items(self) -> list[Stored]:
        """The items of a list or a set."""
        assert self.type in ("list", "set")
        return self.value  # type: ignore[return-value]


@dataclass
class State:
    """All of Asynq's keys at one moment of a run that `began` and had `ended` at these times.

    Unix seconds. Those of a golden state are cut to whole seconds. `rules` says how the scores
    of a kind were rounded, where they were not cut.
    """

    keys: dict[str, Key]
    began: float
    ended: float
    rules: dict[str, Rule] = field(default_factory=dict[str, Rule])


def decoded(key: str, name: str | None, raw: bytes) -> Stored:
    """Decode what stands at a key, in the field `name` of a hash."""
    for keys, place, message in MESSAGES:
        if keys.fullmatch(key) and place in (None, name or ""):
            return message_of(f"asynq.{message}", raw)
    return raw.decode("utf-8", "backslashreplace")


def message_of(name: str, raw: bytes) -> dict[str, Any]:
    """Decode a message by its full name."""
    kind: type[Message] = getattr(asynq_pb2, name.removeprefix("asynq."))
    return MessageToDict(kind.FromString(raw), preserving_proto_field_name=True)


async def state_of(redis: Connection, began: float) -> State:
    """Read a database of a run that began at `began`; our own keys are known and left out."""
    keys: dict[str, Key] = {}
    async for raw_key in redis.scan_iter(count=1000):
        key = raw_key.decode()
        if key.startswith("asyncq:"):
            assert OUR_KEYS.fullmatch(key), f"{key!r} is not on the list of our keys"
        else:
            keys[key] = await _key(redis, key)
    return State(keys, began, time.time())


async def _key(redis: Connection, key: str) -> Key:
    kind = (await redis.type(key)).decode()
    ttl_ms = await redis.pttl(key)
    match kind:
        case "string":
            return Key(kind, ttl_ms, decoded(key, None, await redis.get(key) or b""))
        case "list":
            items = await redis.lrange(key, 0, -1)
            return Key(kind, ttl_ms, [decoded(key, None, item) for item in items])
        case "set":
            members = sorted(await redis.smembers(key))
            return Key(kind, ttl_ms, [decoded(key, None, member) for member in members])
        case "zset":
            scores = await redis.zrange(key, 0, -1, withscores=True)
            return Key(kind, ttl_ms, {member.decode(): score for member, score in scores})
        case "hash":
            pairs = {name.decode(): raw for name, raw in (await redis.hgetall(key)).items()}
            fields = {name: decoded(key, name, raw) for name, raw in pairs.items()}
            return Key(kind, ttl_ms, fields)
        case _:
            raise AssertionError(f"{key!r} is a {kind}, which Asynq does not use")


def anonymous(state: State, *, random_ids: bool) -> State:
    """Give what differs from run to run a common name: servers, days and, if asked, task ids."""
    keys, names = deepcopy(state.keys), dict[str, str]()
    for day in {_day(state.began), _day(state.ended)}:
        names[f"processed:{day}"] = "processed:<today>"
        names[f"failed:{day}"] = "failed:<today>"
    for key, stored in keys.items():
        if match := re.fullmatch(r"asynq:(?:servers|workers):\{(.*)\}", key):
            names[match[1]] = "<server>"
            infos = [stored.value] if stored.type == "string" else list(stored.hash.values())
            for info in infos:
                _take_out_identity(info, match[1])
        if random_ids and (match := re.fullmatch(r"asynq:\{.*\}:t:([0-9a-f-]{36})", key)):
            names[match[1]] = f"<id {sum('<id' in name for name in names.values())}>"
    return State(_renamed(keys, names), state.began, state.ended, state.rules)


def _day(unix_s: float) -> str:
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d}"


def _take_out_identity(info: Any, identity: str) -> None:
    told = f"{info.pop('host')}:{info.pop('pid')}:{info.pop('server_id')}"
    assert told == identity, f"a record of server {identity!r} tells {told!r}"


def _renamed(value: Any, names: dict[str, str]) -> Any:
    match value:
        case str():
            for name, common in names.items():
                value = value.replace(name, common)
            return value
        case list():
            return [_renamed(item, names) for item in value]
        case dict():
            return {_renamed(name, names): _renamed(item, names) for name, item in value.items()}
        case Key():
            return Key(value.type, value.ttl_ms, _renamed(value.value, names))
        case _:
            return value
