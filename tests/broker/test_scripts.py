"""The scripts' headers are their contracts: read, listed, and held against every call."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from asyncq.broker import scripts
from asyncq.broker.keys import QueueKeys
from asyncq.broker.resp import pack
from asyncq.broker.scripts import SCRIPTS, Script
from tests.stores import Database

LUA = Path(scripts.__file__).parent / "lua"
HEADER = "-- {name}: does something.\n-- KEYS    a, b\n-- ARGV    x, rows[p, q]\n-- RETURNS 1\n"


def script(name: str = "move", header: str = HEADER, body: str = "return 1") -> Script:
    return Script(name, header.format(name=name) + body, {"start": "-- start"})


def rows(table: str) -> list[tuple[str, str]]:
    return re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.M)


def test_every_file_is_a_script() -> None:
    assert SCRIPTS.keys() == {file.stem for file in LUA.glob("*.lua")}


def test_the_readme_lists_every_script_with_its_sentence() -> None:
    listed, libraries = (LUA / "README.md").read_text().split("`lib/`")
    assert rows(listed) == sorted((name, script.sentence) for name, script in SCRIPTS.items())
    assert {name for name, _ in rows(libraries)} == {f.stem for f in (LUA / "lib").glob("*.lua")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_header_names_keys_that_exist_and_only_what_the_script_uses(name: str) -> None:
    found = SCRIPTS[name]
    known = {*QueueKeys.__slots__, "last", "task", "server", "workers"}
    assert set(found.keys) <= known
    assert found.sentence.endswith(".")
    assert found.returns
    _, _, body = found.text.partition(f"-- {name}:")
    libraries = found.text.partition(f"-- {name}:")[0]
    for local in (*found.keys, *found.scalars):
        pattern = rf"\b{local}\b"
        in_prologue = len(re.findall(rf"^local {local} = ", libraries, re.M))
        uses = len(re.findall(pattern, libraries)) - in_prologue
        code = re.sub(r"^--.*$", "", body, flags=re.M)
        assert uses > 0 or re.search(pattern, code), f"{name}.lua never uses {local}"


@pytest.mark.parametrize(
    ("keys", "arguments", "says"),
    [
        ({"a": "1"}, {"x": 1, "rows": []}, "keys"),
        ({"a": "1", "b": "2", "c": "3"}, {"x": 1, "rows": []}, "keys"),
        ({"a": "1", "c": "2"}, {"x": 1, "rows": []}, "keys"),
        ({"a": "1", "b": "2"}, {"x": 1}, "arguments"),
        ({"a": "1", "b": "2"}, {"x": 1, "rows": [], "y": 2}, "arguments"),
        ({"a": "1", "b": "2"}, {"x": 1, "rows": ["p"]}, "row of rows has 2 fields"),
    ],
)
def test_a_call_that_does_not_fit_the_header_is_a_type_error(
    keys: dict[str, str], arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(TypeError, match=says):
        script().on(keys)(**arguments)


def test_a_call_is_written_in_the_order_of_the_header() -> None:
    rows = ["p1", "q1", "p2", "q2"]
    keys = {"b": "B", "a": "A"}
    for command in (script().on(keys)(rows=rows, x="X"), script().on(keys, x="X")(rows=rows)):
        assert command.by_digest[2:] == [2, "A", "B", "X", 2, "p1", "q1", "p2", "q2"]
        assert command.packed == pack(command.by_digest)


def test_only_the_first_arguments_can_be_fixed() -> None:
    with pytest.raises(TypeError, match="begin with the arguments"):
        script().on({"a": "1", "b": "2"}, rows="p")


def test_an_argument_that_is_fixed_is_not_given_again() -> None:
    with pytest.raises(TypeError, match="arguments"):
        script().on({"a": "1", "b": "2"}, x=1)(x=1, rows=[])


@pytest.mark.parametrize(
    "source",
    [
        "return 1",
        "-- other: does something.\n-- KEYS    -\n-- ARGV    -\n-- RETURNS 1\n",
        "-- move\n-- KEYS    -\n-- ARGV    -\n-- RETURNS 1\n",
        "-- move: does something.\n-- KEYS    a\n-- RETURNS 1\n",
        "-- move: does something.\n-- KEYS    a\n-- ARGV    x\n",
    ],
)
def test_a_file_without_its_header_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="move"):
        Script("move", source, {})


def test_a_library_that_is_not_there_is_refused() -> None:
    with pytest.raises(KeyError, match="nothing"):
        Script("move", HEADER.format(name="move") + "-- USES    nothing\n", {})


async def test_names_mean_the_same_on_both_sides(each_store: Database) -> None:
    echo = script(
        body="return { a, b, x, rows_n, ARGV[rows_at + 1], ARGV[rows_at + 2], ARGV[rows_at + 4] }"
    )
    command = echo.on({"a": "A", "b": "B"})(x="X", rows=["p1", "q1", "p2", "q2"])
    async with Redis.from_url(each_store.url) as redis:
        answer = await redis.execute_command(*command.by_text)
        assert answer == [b"A", b"B", b"X", 2, b"p1", b"q1", b"q2"]
        assert await redis.execute_command(*command.by_digest) == answer


async def test_every_script_compiles(each_store: Database) -> None:
    async with Redis.from_url(each_store.url) as redis:
        for name, found in SCRIPTS.items():
            assert await redis.script_load(found.text) == found.digest, name
