"""The docs hold: the quickstart runs as it stands, links lead somewhere, names and numbers fit.

A checker is a function of a page's text that returns what is wrong, so that the last test can show
each of them a mistake.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import importlib
import inspect
import re
import shlex
import signal
import sys
import tomllib
from asyncio.subprocess import PIPE, STDOUT
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import typer
from redis.asyncio import Redis

import asyncq
from asyncq import Client, Context, Inspector, Mux, Retry, Server, SkipRetry, TaskHandle
from asyncq.broker import keys
from asyncq.cli.main import app
from asyncq.handler import FOR_HANDLER, FOR_RUN
from asyncq.message import MALFORMED_TYPE
from asyncq.options import FOR_TASK, FOR_TYPE
from asyncq.proto import asynq_pb2
from asyncq.settings import Settings
from asyncq.testing import make_context
from tests.e2e.command import Running, run
from tests.e2e.program import environment
from tests.stores import KINDS, StoreServer

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, *sorted(ROOT.glob("*.md"))]
SOURCES = sorted((ROOT / "asyncq").rglob("*.py"))
LUA = ROOT / "asyncq" / "broker" / "lua"

Problems = list[str]


# Reading a page


class Block(NamedTuple):
    """A fenced block: `python` to be run, `python fragment` only read, `console` and so on."""

    info: str
    text: str
    line: int

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def is_fragment(self) -> bool:
        return self.info.endswith(" fragment")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text("utf-8")


def blocks(text: str, language: str = "") -> list[Block]:
    found: list[Block] = []
    fence = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)
    for match in fence.finditer(text):
        block = Block(
            match[2].strip(), inspect.cleandoc(match[3]), text.count("\n", 0, match.start())
        )
        if block.language == language or not language:
            found.append(block)
    return found


def prose(text: str) -> str:
    return re.sub(r"^( *)```.*\n(?:.*\n)*?\1```$", "", text, flags=re.MULTILINE)


def code_spans(text: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def anchors(text: str) -> set[str]:
    """What may stand behind `#`: GitHub's names of the headings, and explicit ones."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    numbered = {f"{name}-{i}" for name, n in found.items() for i in range(1, n + 1)}
    return {*found, *numbered, *re.findall(r'<a id="([^"]+)">', text)}


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one."""
    return re.split(r"^#+ ", text.split(f"\n{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The rows of all tables, without their heads."""
    table = re.compile(r"^\|[^\n]*\|\n\|[ -|]*\|\n((?:\|.*\|\n?)*)", re.MULTILINE)
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for match in table.finditer(text)
        for line in match[1].splitlines()
    ]


def named(cell: str) -> list[str]:
    """The names in the first code spans of a cell, without what is given to them."""
    return [re.split(r"[ =(\[]", span)[0] for span in re.findall(r"`([^`]+)`", cell)]


# What there is


@cache
def flags() -> dict[str, set[str]]:
    """The flags of each command; under the empty name those of all."""
    group = cast(Any, typer.main.get_command(app))
    found = {"": {"--help", "-h", *(f for p in group.params for f in p.opts)}}
    for name, command in group.commands.items():
        found[name] = {
            flag
            for parameter in command.params
            if parameter.param_type_name == "option" and not parameter.hidden
            for flag in (*parameter.opts, *parameter.secondary_opts)
        }
    return found


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of a function or class with their defaults."""
    found = inspect.signature(function).parameters
    return {
        name: one.default
        for name, one in found.items()
        if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD) and name != "self"
    }


SERVER, CLIENT = parameters(Server), parameters(Client)
MUX = {"prefix", "lifespan"}
CALLS: dict[str, frozenset[str]] = {
    "Client": frozenset(CLIENT),
    "Mux": FOR_TYPE | MUX,
    "Server": frozenset(SERVER),
    "SyncClient": frozenset(CLIENT),
    "Task": FOR_TASK | {"result"},
    "TaskType": FOR_TYPE | {"result"},
    "cancel": frozenset(parameters(TaskHandle.cancel)),
    "enqueue": FOR_TASK,
    "enqueue_many": frozenset({"return_exceptions"}),
    "exponential": frozenset(parameters(asyncq.exponential)),
    "handle": FOR_RUN | {"queue", "of"},
    "make_context": frozenset(parameters(make_context)),
    "new": FOR_TASK,
    "result": frozenset(parameters(TaskHandle.result)),
    "task": FOR_HANDLER,
}
OBJECTS: dict[str, type[Any]] = {
    "client": Client,
    "ctx": Context,
    "handle": TaskHandle,
    "mux": Mux,
    "server": Server,
}
VARIABLES = {f"ASYNCQ_{name.upper()}" for name in Settings.model_fields}
LOGGERS = {
    name for file in SOURCES for name in re.findall(r'getLogger\("(\w[\w.]*)"\)', file.read_text())
}
ERRORS = {
    *(
        name
        for file in SOURCES
        for name in re.findall(r"^class (\w+Error)", file.read_text(), re.M)
    ),
    *(name for name in dir(builtins) if name.endswith("Error")),
    "CancelledError",
}
OPTIONS = {*set().union(*CALLS.values()), "critical", "default", "bind"}  # queues, and Celery's


def redis_keys() -> set[str]:
    """Every key that asyncq touches, as the docs write it."""
    k = keys.queue_keys("queue")
    pid: Any = "<pid>"
    return {
        *(value for value in vars(keys).values() if isinstance(value, str) and ":" in value[:7]),
        *(
            getattr(k, name)
            for name in k.__slots__
            if name not in ("queue", "prefix", "own_prefix")
        ),
        k.task("<id>"),
        k.group("<group>"),
        k.unique("<type>", "<digest>"),
        k.last("<server id>"),
        keys.server("<host>", pid, "<server id>"),
        keys.workers("<host>", pid, "<server id>"),
    }


# Checkers: a page's text → what is wrong with it


def dead_links(text: str, path: Path) -> Problems:
    """Links to files that are not there, or to headings that are not in them."""
    dead: Problems = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]+`", "", prose(text))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists():
            dead.append(f"{link}: there is no such file")
        elif anchor:
            there = text if target == path else target.read_text("utf-8")
            if anchor not in anchors(there):
                dead.append(f"{link}: there is no such heading")
    return dead


def unknown_names(text: str) -> Problems:
    """Names that look like ours and are not."""
    plain, spans = prose(text), code_spans(text)
    found = [
        *(name for name in set(re.findall(r"\basyncq(?:\.\w+)+", plain)) if not is_there(name)),
        *(set(re.findall(r"\bASYNCQ_[A-Z_]+\b", text)) - VARIABLES),
        *(set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - set().union(*flags().values())),
    ]
    for span in spans:
        for thing, name in re.findall(r"(?<![\w/.])(\w+)\.([a-z_]+)\b", span):
            if thing in OBJECTS and not hasattr(OBJECTS[thing], name):
                found.append(f"{thing}.{name}")
        for name in re.findall(r"^([a-z_]+)=", span):
            if name not in OPTIONS:
                found.append(f"{name}=")
        for name in re.findall(r"(?<!\.)\b[A-Z]\w+Error\b", span):
            if name not in ERRORS:
                found.append(name)
        for path in re.findall(r"^(?:asyncq|benchmarks|docs|examples|tests)/[\w./-]*", span):
            if not (ROOT / path).exists():
                found.append(path)
    return found


def is_there(name: str) -> bool:
    """Whether a dotted name is a logger, or can be imported."""
    if name in LOGGERS:
        return True
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ImportError:
        try:
            return bool(module) and hasattr(importlib.import_module(module), attribute)
        except ImportError:
            return False
    return True


def wrong_numbers(text: str) -> Problems:
    """Numbers that name the constant they come from, in Python or Lua, and are not it."""
    wrong: Problems = []
    claim = re.compile(r"(\d+(?:\.\d+)?)\s(?:s|tasks)\s+\(`([\w./]+)`(?: (\w+))?\)")
    for number, place, name in claim.findall(text):
        if name:
            match = re.search(rf"^local {name} = (\d+)", (ROOT / place).read_text(), re.M)
            value = float(match[1]) if match else None
        else:
            module, _, constant = place.rpartition(".")
            value = getattr(importlib.import_module(module), constant, None)
        if value != float(number):
            wrong.append(f"{number} ({place} {name}) is {value}")
    return wrong


def broken_python(text: str, namespace: dict[str, Any]) -> Problems:
    """Blocks that do not run, and options that no call takes; blocks go on from one another.

    A block that awaits at its top is read only: its imports are made, its names must be known.
    """
    broken: Problems = []
    for block in blocks(text, "python"):
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST
        try:
            tree: Any = compile(block.text, "docs", "exec", flags)
        except SyntaxError as error:
            broken.append(f"line {block.line}: {error}")
            continue
        if block.is_fragment:
            continue
        broken += [f"line {block.line}: {call}" for call in wrong_options(tree)]
        awaits = any(map(is_awaiting, tree.body))
        imports: list[ast.stmt] = [
            one for one in tree.body if isinstance(one, ast.Import | ast.ImportFrom)
        ]
        body = ast.Module(imports if awaits else tree.body, [])
        try:
            exec(compile(body, "docs", "exec", dont_inherit=True), namespace)
        except Exception as error:
            broken.append(f"line {block.line}: {type(error).__name__}: {error}")
        if awaits:
            broken += [f"line {block.line}: {name}?" for name in unbound(tree, namespace)]
    return broken


def wrong_options(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(name) | ast.Attribute(attr=name)) if name in CALLS:
                for keyword in node.keywords:
                    if keyword.arg is not None and keyword.arg not in CALLS[name]:
                        yield f"{name}({keyword.arg}=)"
            case _:
                pass


def is_awaiting(node: ast.AST) -> bool:
    """Whether a statement awaits, but for functions that it defines."""
    if isinstance(node, ast.Await | ast.AsyncFor | ast.AsyncWith):
        return True
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return False
    return any(map(is_awaiting, ast.iter_child_nodes(node)))


def unbound(tree: ast.AST, namespace: Mapping[str, Any]) -> set[str]:
    """Names that are read and bound nowhere."""
    read: set[str] = set()
    bound = {*namespace, *dir(builtins)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(name, ast.Load()):
                read.add(name)
            case ast.Name(name) | ast.arg(name) | ast.ExceptHandler(name=str(name)):
                bound.add(name)
            case ast.FunctionDef(name) | ast.AsyncFunctionDef(name) | ast.ClassDef(name):
                bound.add(name)
            case _:
                pass
    return read - bound


# The quickstart


class Quickstart:
    """Goes through a page as its reader does: writes the files, runs the commands, compares.

    A Python block is written to the file that its first line names, or added to it (`continued`).
    In a console block stands what follows a command, `...` for anything. A worker runs until the
    next one is started; Ctrl-C ends it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._url = ""
        self._worker: Running | None = None
        self._stack = AsyncExitStack()

    async def follow(self, text: str) -> None:
        async with self._stack:
            for block in blocks(text):
                if block.language == "python":
                    self._write(block.text)
                elif block.language == "console":
                    for command, expected in commands(block.text):
                        await self._do(command, expected)
            await self._stop_worker()

    def _write(self, text: str) -> None:
        title = text.splitlines()[0]
        match = re.fullmatch(r"# (\w+\.py)(, continued)?", title)
        assert match, f"{title!r} names no file"
        with (self._folder / match[1]).open("a" if match[2] else "x") as file:
            file.write(text + "\n")

    async def _do(self, command: str, expected: str) -> None:
        program, *arguments = shlex.split(command)
        if program == "pip":
            check_install(arguments)
        elif program == "export":
            name, _, self._url = arguments[0].partition("=")
            assert name == "ASYNCQ_REDIS_URL"
        elif program == "asyncq" and arguments[0] == "worker" and "--burst" not in arguments:
            await self._stop_worker()
            self._worker = Running(*arguments, url=self._url, folder=self._folder)
            await self._stack.enter_async_context(self._worker)
            await self._worker.logged(" runs: ")
            compare(self._worker.log, expected, command)
        else:
            if "--burst" in arguments:
                await self._stop_worker()
            output = await (self._asyncq if program == "asyncq" else self._python)(arguments)
            compare(output, expected, command)

    async def _asyncq(self, arguments: list[str]) -> str:
        ended = await run(*arguments, url=self._url, folder=self._folder)
        assert ended.code == ("Error:" in ended.err), ended.err
        return ended.err + ended.out

    async def _python(self, arguments: list[str]) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            cwd=self._folder,
            env=environment(ASYNCQ_REDIS_URL=self._url),
            stdout=PIPE,
            stderr=STDOUT,
        )
        try:
            async with asyncio.timeout(30):
                output, _ = await process.communicate()
        except BaseException:
            process.kill()
            await process.communicate()
            raise
        assert process.returncode == 0, output.decode()
        return output.decode()

    async def _stop_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.send(signal.SIGINT)
            assert await worker.ended() == 0, worker.log


def commands(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with what it is to write."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        yield command, expected.strip("\n")


def compare(output: str, expected: str, command: str) -> None:
    lines = "\n".join(line.rstrip() for line in output.splitlines()).strip("\n")
    pattern = ".*".join(re.escape(part) for part in expected.split("..."))
    assert re.fullmatch(pattern, lines, re.DOTALL), f"{command} wrote\n{lines}"


def check_install(arguments: Iterable[str]) -> None:
    """Installing takes a network: see that what is installed is ours, with extras that exist."""
    *install, what = arguments
    match = re.fullmatch(r"\.\[([\w,]+)\]", what)
    assert install == ["install"]
    assert match
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(match[1].split(",")) <= extras.keys()


async def test_the_quickstart_does_what_it_says(tmp_path: Path) -> None:
    await Quickstart(tmp_path).follow(page("quickstart.md"))


# All pages


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    assert dead_links(path.read_text("utf-8"), path) == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_names_and_numbers_are_those_of_the_code(path: Path) -> None:
    text = path.read_text("utf-8")
    assert unknown_names(text) == []
    assert wrong_numbers(text) == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_python_runs(path: Path) -> None:
    if path.name != "quickstart.md":  # which has a test of its own
        assert broken_python(path.read_text("utf-8"), {"__name__": "docs"}) == []


def test_everything_public_is_in_the_docs() -> None:
    text = "\n".join(path.read_text("utf-8") for path in DOCS)
    words = {word for span in code_spans(text) for word in re.findall(r"--?[\w-]+|\w+", span)}
    spans = set(code_spans(text))
    commands = flags().keys() - {""}
    wanted = {*asyncq.__all__, *VARIABLES, *set().union(*flags().values())}
    shell_completion = {"--install-completion", "--show-completion"}
    assert wanted - words - shell_completion == set()
    assert {name for name in commands if not any(f"asyncq {name}" in one for one in spans)} == set()


# Single pages


def shown(value: object) -> str:
    """A default as the tables show it."""
    text = value.__name__ if inspect.isfunction(value) else repr(value)
    return f"`{text}`".replace("'", '"')


def test_the_tables_of_options_have_every_option_with_its_default() -> None:
    text = page("configuration.md")
    for heading, options in (
        ("## `Server`", {name: SERVER[name] for name in SERVER if name != "redis"}),
        ("## `Client` and `SyncClient`", CLIENT),
    ):
        table = {named(option)[0]: default for option, default, *_ in rows(section(text, heading))}
        assert table == {name: shown(default) for name, default in options.items()}
    of_task = section(text, "## Options of a task")
    assert {named(row[0])[0] for row in rows(of_task)} == FOR_TASK | FOR_RUN
    assert {named(row[0])[0] for row in rows(of_task)[7:12]} == FOR_TASK - FOR_TYPE


def test_the_table_of_variables_has_every_setting_with_its_default() -> None:
    table = {
        named(variable)[0]: named(default)[0]
        for variable, default, _ in rows(section(page("configuration.md"), "## Variables"))
    }
    defaults = {
        f"ASYNCQ_{name.upper()}": field.default for name, field in Settings.model_fields.items()
    }
    assert table == {
        name: f"{default:g}" if isinstance(default, float) else str(default).lower()
        for name, default in defaults.items()
        if name != "ASYNCQ_QUEUES"
    } | {"ASYNCQ_QUEUES": ",".join(defaults["ASYNCQ_QUEUES"])}


def test_each_command_has_a_table_of_its_flags() -> None:
    text = page("configuration.md")
    tables: dict[str, set[str]] = defaultdict(set)
    for heading, command in re.findall(r"^(## `asyncq (\w+).*)$", text, re.MULTILINE):
        for row in rows(section(text, heading)):
            tables[command] |= set(named(row[0]))
    assert tables == {name: found for name, found in flags().items() if name}


def test_the_wire_format_has_every_key_and_field() -> None:
    text = page("wire.md")
    spans = set(code_spans(text))
    assert redis_keys() - spans == set()
    looks_like_a_key = {span for span in spans if re.match(r"a\w+q:\S*[^:]$", span)}
    assert looks_like_a_key - redis_keys() == {MALFORMED_TYPE}
    assert {one.name for one in asynq_pb2.TaskMessage.DESCRIPTOR.fields} - spans == set()
    assert set(asynq_pb2.DESCRIPTOR.message_types_by_name) - spans == set()
    doc = inspect.getdoc(keys.QueueKeys.task) or ""
    fields = re.findall(r"\w+", doc.partition(":")[2].replace("ours", ""))
    assert len(fields) > 5
    assert set(fields) - spans == set()


def test_the_numbers_of_a_tasks_life_are_checked_at_all() -> None:
    assert len(re.findall(r"\(`asyncq[./][\w./]+\.(?:[A-Z]|lua` [A-Z])", page("task-life.md"))) >= 9


def test_model_and_struct_give_the_bytes_that_are_shown() -> None:
    text = page("from-asynq.md")
    namespace: dict[str, Any] = {"__name__": "docs"}
    assert broken_python(text, namespace) == []
    task = namespace["welcome"].new(namespace["Welcome"](user_id=1))
    assert [task.payload.decode()] == [block.text for block in blocks(text, "json")]


# The users of Redis


def acl() -> dict[str, list[str]]:
    """The rules of each user, as deployment.md gives them."""
    lines = re.findall(r"^ACL SETUSER (\w+) on (.+)$", page("deployment.md"), re.MULTILINE)
    return {name: rules.split() for name, rules in lines}


def test_users_may_run_every_command_of_their_scripts() -> None:
    called: dict[str, set[str]] = {}
    for file in LUA.rglob("*.lua"):
        names = re.findall(r"redis\.p?call\(\s*'(\w+)'", file.read_text())
        called[file.stem] = {f"+{name.lower()}" for name in names}
    assert set().union(*called.values()) - set(acl()["worker"]) == set()
    ours = called["enqueue"] | called["clock"] | called["types"]
    assert ours - set(acl()["producer"]) == set()


@pytest.mark.parametrize("kind", KINDS)
async def test_users_with_these_rights_can_do_their_work(
    redis_server: Callable[..., StoreServer], kind: str
) -> None:
    server = redis_server(kind)
    async with Redis.from_url(server.url) as admin:
        reading = "~" if kind == "redis-6.2" else "%R~"
        for name, rules in acl().items():
            ours = (rule.replace("%R~", reading) for rule in rules)
            await admin.execute_command("ACL", "SETUSER", name, "on", *ours)

    def url(user: str) -> str:
        return f"unix://{user}:secret@{server.socket}"

    mux = Mux()

    @mux.task("ok", retention=60, unique=60)
    async def ok(number: int, ctx: Context) -> int:
        await ctx.progress(0.5)
        if ctx.retry_count == 0:
            raise Retry(0)
        await ctx.client.enqueue(followed.new(group="g"))
        return number

    @mux.task("followed")
    async def followed() -> None: ...

    @mux.task("bad", retention=60)
    async def bad() -> None:
        raise SkipRetry("no")

    @mux.task("slow", retention=60)
    async def slow(ctx: Context) -> None:
        begun.set()
        await asyncio.Event().wait()

    begun = asyncio.Event()
    async with (
        Client(url("producer")) as client,
        Server(url("worker"), shutdown_timeout=0).running(mux) as worker,
    ):
        handles = await client.enqueue_many([ok.new(1), ok.new(2, process_in=0.01)])
        assert [await handle.result(timeout=10) for handle in handles] == [1, 2]
        for task, error in ((bad.new(), "no"), (slow.new(), "context canceled")):
            handle = await client.enqueue(task)
            if error != "no":
                await asyncio.wait_for(begun.wait(), 10)
                await handle.cancel(retry=False)
            with pytest.raises(asyncq.TaskFailedError, match=error):
                await handle.result(timeout=10)
        await worker.drain()
        async with Inspector(url("viewer")) as inspector, Client(url("viewer")) as viewer:
            (info,) = await inspector.queue_infos()
            assert (info.completed, info.archived, info.aggregating) == (2, 2, 2)
            assert (await viewer.handle(handles[0].id).info()).progress == (0.5, "")
            with pytest.raises(asyncq.BrokerError):
                await viewer.enqueue(followed.new())
    async with Redis.from_url(server.url) as admin:
        denied = cast(list[dict[str, Any]], await admin.acl_log())
    # What the client library says of itself is not needed; Redis 6.2 knows no subcommands here.
    refused = {one["object"] for one in denied} - {"client|setinfo", "client"}
    assert refused == {"sadd", "multi", "hset", "lpush", "exec"}
    assert {one["username"] for one in denied if one["object"] in refused} == {"viewer"}


# The checkers themselves


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("see `asyncq.Clint`", "asyncq.Clint"),
        ("see `asyncq.broker.brokr.BATCH`", "asyncq.broker.brokr.BATCH"),
        ("set `ASYNCQ_URL`", "ASYNCQ_URL"),
        ("```console\n$ asyncq worker app:mux --process 2\n```", "--process"),
        ("`ctx.retries`", "ctx.retries"),
        ("`await handle.wait()`", "handle.wait"),
        ("`delay=5`", "delay="),
        ("`QueueFullError`", "QueueFullError"),
        ("`asyncq/server/fleet.py`", "asyncq/server/fleet.py"),
    ],
)
def test_a_name_that_does_not_exist_is_seen(text: str, problem: str) -> None:
    assert unknown_names(text + "\n") == [problem]


@pytest.mark.parametrize(
    "text",
    [
        "from asyncq import Clint",
        "mux.task('a')",
        "import asyncq\nasyncq.Task('a', quue='b')",
        "from asyncq import Client\nasync with Client() as client:\n    await client.enqueue(task)",
        "from asyncq import *\nasync def f(c):\n    await c.enqueue(Task('a'), delay=5)",
        "await handle.result(timeout=5)",
        "x = (",
    ],
)
def test_python_that_does_not_run_is_seen(text: str) -> None:
    assert broken_python(f"```python\n{text}\n```\n", {"__name__": "docs"})


@pytest.mark.parametrize("link", ["nowhere.md", "quickstart.md#nothing", "#nothing"])
def test_a_dead_link_is_seen(link: str) -> None:
    assert len(dead_links(f"# Page\n\n[here]({link})\n", ROOT / "docs" / "page.md")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "6 s (`asyncq.server.loops.heartbeat.INTERVAL_S`)",
        "250 s (`asyncq.broker.broker.BATCHES`)",
        "30 s (`asyncq/broker/lua/lib/lease.lua` LEASE_S)",
    ],
)
def test_a_wrong_number_is_seen(text: str) -> None:
    assert len(wrong_numbers(text)) == 1


@pytest.mark.parametrize("output", ["a 1 b", "a b\nc", ""])
def test_output_that_is_not_as_shown_is_seen(output: str) -> None:
    compare("a 1 b\nc\n", "a ... b\nc", "it")
    with pytest.raises(AssertionError):
        compare(output, "a ... b\nc", "it")
