"""Loads lua/: each script's header is its contract, and a call that breaks it is a TypeError.

A script opens with its header:

    -- forward: moves what is due to pending.
    -- KEYS    pending, scheduled
    -- ARGV    prefix, limit, tasks[id, message]
    -- RETURNS {moved, next_due_ms}
    -- USES    clock

From it the loader writes the script's first lines, so a name means the same on both sides:
a key or argument is a local of its name; a list such as `tasks` becomes `tasks_n`, the number
of its rows, and `tasks_at`, so that field j of row i is `ARGV[tasks_at + (i - 1) * 2 + j]`.
USES puts the named files of lua/lib/ in front.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any, NamedTuple, cast

from asyncq.broker.resp import Arg, pack

Rows = Sequence[Arg]
"""The rows of a list argument, one after the other in one flat sequence."""


class Call:
    """A script on its keys, with the arguments that stay the same: made once, called often."""

    def __init__(self, script: Script, keys: Mapping[str, str], first: Mapping[str, Arg]) -> None:
        if set(keys) != set(script.keys):
            raise TypeError(f"{script.name}.lua takes the keys {script.keys}, not {list(keys)}")
        if list(first) != script.scalars[: len(first)]:
            raise TypeError(f"{script.name}.lua does not begin with the arguments {list(first)}")
        self.script = script
        self.head: list[Arg] = [len(keys), *(keys[name] for name in script.keys), *first.values()]
        self._scalars = script.scalars[len(first) :]

    def __call__(self, **arguments: Arg | Rows) -> Command:
        """Make the call; `arguments` by their names in the header.

        Raises:
            TypeError: a name is missing, is not in the header, or a list is not in whole rows.
        """
        script, given = self.script, cast(dict[str, Any], arguments)
        try:
            tail: list[Arg] = [*map(given.__getitem__, self._scalars)]
            for name, width in script.lists.items():
                rows, ragged = divmod(len(given[name]), width)
                if ragged:
                    raise TypeError(f"{script.name}.lua: a row of {name} has {width} fields")
                tail.append(rows)
        except KeyError:
            raise self._unfit(given) from None
        if len(given) != len(tail):
            raise self._unfit(given)
        for name in script.lists:
            tail += given[name]
        return Command(self, tail, pack(("EVALSHA", script.digest, *self.head, *tail)))

    def _unfit(self, given: Mapping[str, Any]) -> TypeError:
        takes = sorted([*self._scalars, *self.script.lists])
        return TypeError(f"{self.script.name}.lua takes the arguments {takes}, not {sorted(given)}")


class Command(NamedTuple):
    """A script call, ready to be sent: by its digest first, by its text when Redis lost it.

    `packed` is the one by its digest, as Redis reads it.
    """

    call: Call
    tail: list[Arg]
    packed: bytes

    @property
    def by_digest(self) -> list[Arg]:
        return ["EVALSHA", self.call.script.digest, *self.call.head, *self.tail]

    @property
    def by_text(self) -> list[Arg]:
        return ["EVAL", self.call.script.text, *self.call.head, *self.tail]


class Script:
    """One atomic move in Lua, called by the names in its header."""

    def __init__(self, name: str, source: str, libraries: Mapping[str, str]) -> None:
        header = _header(name, source)
        self.name = name
        self.sentence = header["sentence"]
        self.returns = header["RETURNS"]
        self.keys = _names(header["KEYS"])
        self.scalars, self.lists = _arguments(header["ARGV"])
        uses = _names(header.get("USES", ""))
        self.text = "\n".join([self._prologue(), *(libraries[library] for library in uses), source])
        self.digest = sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def _prologue(self) -> str:
        lines = [f"local {key} = KEYS[{i}]" for i, key in enumerate(self.keys, 1)]
        lines += [f"local {name} = ARGV[{i}]" for i, name in enumerate(self.scalars, 1)]
        at = str(len(self.scalars) + len(self.lists))
        for i, (name, width) in enumerate(self.lists.items(), len(self.scalars) + 1):
            lines += [
                f"local {name}_n = tonumber(ARGV[{i}])",
                f"local {name}_at = {at}",
            ]
            at = f"{name}_at + {name}_n * {width}"
        return "\n".join(lines)

    def on(self, keys: Mapping[str, str], **first: Arg) -> Call:
        """Fix the keys, by their names in the header, and the `first` of the arguments.

        Raises:
            TypeError: a key is missing or is not in the header, or these are not the first.
        """
        return Call(self, keys, first)


def _header(name: str, source: str) -> dict[str, str]:
    first, *rest = source.splitlines()
    said, _, sentence = first.removeprefix("-- ").partition(": ")
    if said != name or not sentence:
        raise ValueError(f"{name}.lua must open with '-- {name}: what it does.'")
    header, entry = {"sentence": sentence}, "sentence"
    for line in rest:
        if match := re.match(r"-- (KEYS|ARGV|RETURNS|USES)\s+(.+)", line):
            entry = match[1]
            header[entry] = match[2].strip()
        elif match := re.match(r"--\s{5,}(\S.*)", line):  # goes on with the line above
            header[entry] += " " + match[1].strip()
        else:
            break
    missing = {"KEYS", "ARGV", "RETURNS"} - header.keys()
    if missing:
        raise ValueError(f"the header of {name}.lua lacks {sorted(missing)}")
    return header


def _names(text: str) -> list[str]:
    return [name for name in re.split(r",\s*", text) if name and name != "-"]


def _arguments(text: str) -> tuple[list[str], dict[str, int]]:
    lists = {match[1]: match[2].count(",") + 1 for match in re.finditer(r"(\w+)\[([^\]]+)\]", text)}
    return _names(re.sub(r",?\s*\w+\[[^\]]+\]", "", text)), lists


def _load() -> dict[str, Script]:
    lua = files("asyncq.broker").joinpath("lua")
    libraries = {
        file.name.removesuffix(".lua"): file.read_text("utf-8")
        for file in lua.joinpath("lib").iterdir()
        if file.name.endswith(".lua")
    }
    return {
        (name := file.name.removesuffix(".lua")): Script(name, file.read_text("utf-8"), libraries)
        for file in sorted(lua.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".lua")
    }


SCRIPTS = _load()
