"""State for state: what Go Asynq left in Redis, done again here and compared key by key."""

from __future__ import annotations

import ast
import copy
import re
from base64 import b64decode
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
from redis.asyncio import Redis

from asyncq import Task, asynq_delay
from asyncq.client import Client
from asyncq.proto import asynq_pb2
from tests.golden import files
from tests.golden.compare import differences
from tests.golden.differences import DIFFERENCES, expected
from tests.golden.files import Golden, Run, coverage, load, scenarios
from tests.golden.scenarios import NEEDS_OWN_SERVER, SCENARIOS, World
from tests.golden.state import Key, message_of, state_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "asynq-differences.md"

COVERED = coverage().covered
RECORDED = sorted(
    path.stem for path in files.FOLDER.glob("*.json") if not path.stem.startswith("_")
)


# The scenarios


@pytest.fixture
async def world(name: str, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """A run of the scenario `name` on an empty store."""
    if name in NEEDS_OWN_SERVER:
        url: str = request.getfixturevalue("redis_server")().url
    else:
        url = request.getfixturevalue("store_url")
    async with Client(url) as client, Redis.from_url(url) as redis:
        yield World(load(name), url, client, redis)


@pytest.mark.parametrize("name", COVERED)
async def test_a_scenario_leaves_what_asynq_leaves(name: str, world: World) -> None:
    golden = expected(load(name), COVERED[name])

    await SCENARIOS.get(name, World.enqueue)(world)

    found = differences(golden, await world.run())
    assert not found, "\n".join([f"{name} differs from Asynq:", *found])


# That nothing is left out


def test_every_scenario_is_covered_or_later() -> None:
    names = [*coverage().covered, *coverage().later]

    assert sorted(names) == sorted(scenarios()) == RECORDED
    assert all(reason.strip() for reason in coverage().later.values())


def test_a_scenario_without_operations_of_its_own_only_enqueues() -> None:
    for name in COVERED.keys() - SCENARIOS.keys():
        calls = [call for call, _ in load(name).run.calls]
        assert all(call.startswith("Enqueue(") for call in calls), f"{name} needs a function"


@pytest.mark.parametrize("name", RECORDED)
def test_the_harness_can_read_every_scenario(name: str) -> None:
    golden = load(name)

    assert differences(golden, golden.run) == []


# The page of differences


def entries() -> dict[str, str]:
    """The entries of the page: name → the test that holds it."""
    rows = re.findall(r'^\| <a id="([\w-]+)">.*\| `(tests/[^`]+)` \|$', PAGE.read_text(), re.M)
    return dict(rows)


def test_a_declared_difference_has_its_entry_in_the_docs() -> None:
    declared = {name for names in COVERED.values() for name in names}

    assert declared == DIFFERENCES.keys()
    assert declared <= entries().keys()


def test_every_entry_of_the_docs_names_a_test_that_exists() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| <a id=")]

    assert len(rows) == len(entries()), "an entry is not of the form of the others"
    for name, test in entries().items():
        path, _, function = test.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        functions = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert function in functions, f"{name}: there is no {test}"


# That the harness sees what it should


def changed(golden: Golden) -> Iterator[tuple[str, Run]]:
    """Our run, had we left everything as Asynq does but one thing."""
    keys = golden.run.final.keys
    for key in keys:
        for what, change in CHANGES.get(keys[key].type, {}).items():
            run = copy.deepcopy(golden.run)
            change(run.final.keys[key])
            yield f"{what} of {key}", run
        run = copy.deepcopy(golden.run)
        del run.final.keys[key]
        yield f"no {key}", run
    run = copy.deepcopy(golden.run)
    run.final.keys["asynq:{default}:more"] = Key("string", -1, "x")
    yield "one more key", run


def _expire(key: Key) -> None:
    key.ttl_ms = 5000


def _shift(key: Key) -> None:
    key.value = {member: score + 5 for member, score in key.scores.items()}


def _turn(key: Key) -> None:
    key.items.insert(0, "other")


def _add_field(key: Key) -> None:
    key.hash["group"] = "g"


def _count(key: Key) -> None:
    message: Any = key.hash["msg"]
    message["retried"] = 7


def _fail_later(key: Key) -> None:
    message: Any = key.hash["msg"]
    message["last_failed_at"] = str(int(message["last_failed_at"]) + 5)


def _replace(key: Key) -> None:
    key.value = "2"


CHANGES = {
    "string": {"TTL": _expire, "value": _replace},
    "list": {"TTL": _expire, "items": _turn},
    "set": {"TTL": _expire, "items": _turn},
    "zset": {"TTL": _expire, "scores": _shift},
    "hash": {"TTL": _expire, "field": _add_field, "message": _count, "time": _fail_later},
}


def test_the_harness_sees_every_change() -> None:
    golden = load("archived_exhausted")

    unseen = [what for what, run in changed(golden) if not differences(golden, run)]

    assert unseen == []


async def test_a_key_of_ours_that_nobody_knows_is_a_mistake(store_url: str) -> None:
    async with Redis.from_url(store_url) as redis:
        await redis.set("asyncq:{default}:new", 1)

        with pytest.raises(AssertionError, match="not on the list of our keys"):
            await state_of(redis, 0.0)


def test_a_difference_that_does_not_show_is_stale() -> None:
    with pytest.raises(AssertionError, match="does not show"):
        expected(load("done"), ["ghosts"])


# What else was recorded


def messages(value: Any) -> Iterator[tuple[str, bytes, Any]]:
    """Every message in a golden file: its type, its bytes, and what Go read in them."""
    if isinstance(value, dict):
        if "message" in value:
            yield value["message"], b64decode(value["b64"]), value["decoded"]
        for inner in value.values():
            yield from messages(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from messages(inner)


@pytest.mark.parametrize("name", RECORDED)
def test_our_messages_read_what_go_wrote(name: str) -> None:
    for kind, raw, read in messages(files.read(name)):
        ours = message_of(kind, raw)
        if "error_msg" in ours:  # the place of a panic was shortened where it is shown
            ours["error_msg"] = re.sub(r"\[/.*/(cmd/.*)\]", r"[\1]", ours["error_msg"])
        assert ours == read


def test_our_messages_have_the_fields_of_asynqs() -> None:
    proto = FileDescriptorProto()
    asynq_pb2.DESCRIPTOR.CopyToProto(proto)

    ours = {f"asynq.{message.name}": fields(message) for message in proto.message_type}

    assert ours == files.read("_schema")


def fields(message: DescriptorProto) -> list[dict[str, Any]]:
    """Describe the fields of a message as the golden file does."""
    package = asynq_pb2.DESCRIPTOR.package  # ours; it does not go over the wire
    maps = {f".{package}.{message.name}.{entry.name}": entry for entry in message.nested_type}
    described = []
    for field in message.field:
        own: dict[str, Any] = {
            "number": field.number,
            "name": field.name,
            "type": field.Type.Name(field.type).removeprefix("TYPE_").lower(),
            "label": field.Label.Name(field.label).removeprefix("LABEL_").lower(),
        }
        if entry := maps.get(field.type_name):
            own["label"] = "map"
            own["type_name"] = ",".join(part["type"] for part in fields(entry))
        elif field.type_name:
            own["type_name"] = field.type_name.removeprefix(".")
        first, *others = field.name.split("_")
        own["json_name"] = first + "".join(other.capitalize() for other in others)
        described.append(own)
    return described


@pytest.mark.parametrize("recorded", files.read("_retry_delay"), ids=lambda r: str(r["retried"]))
def test_the_default_delay_has_the_range_of_asynqs(recorded: dict[str, int]) -> None:
    task, error = Task("t"), RuntimeError()

    delays = {asynq_delay(recorded["retried"], error, task) for _ in range(2000)}

    assert (min(delays), max(delays)) == (recorded["min_s"], recorded["max_s"])
    assert len(delays) == recorded["different_values"]
