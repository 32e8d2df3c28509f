"""The moves of a task, in the words of a queue; each is one call of Redis, or safe to repeat."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple, cast

from asyncq.broker import keys
from asyncq.broker.connection import Answer, EndWait, Pool, Waited
from asyncq.broker.keys import queue_keys
from asyncq.broker.refusal import ConnectionLostError, refusal
from asyncq.broker.resp import PART, Arg, form, pack, text
from asyncq.broker.scripts import SCRIPTS, Call, Command
from asyncq.errors import (
    AsyncqError,
    BrokerError,
    BrokerUnavailableError,
    DuplicateTaskError,
    EnqueueUncertainError,
    TaskIDConflictError,
)
from asyncq.outcome import DONE, Ended, Outcome

BATCH: Final = 250
"""Tasks a call; a script call of 1,000 held Redis for 13 ms, and unpack fails near 4,000."""

BATCH_BYTES: Final = 8 * 1024 * 1024
"""Bytes of messages a script call, so that it ends in time over a slow link."""

TOO_LATE_S: Final = 20
"""After this a lease that was taken for a held request may end before anybody extends it."""

WAIT_S: Final = 5
"""How long Redis holds a request for a task: a client that is gone without a word gets no task
after that."""

SERVER_TTL_S: Final = 10  # Asynq: two heartbeats of 5 s

_NEW_HASH: Final = form(b"HSET", None, b"msg", None, b"state", b"pending", b"pending_since", None)
_MULTI: Final = pack(["MULTI"])
_EXEC: Final = pack(["EXEC"])

# A clock that also runs while the machine is suspended, where there is one (Linux).
_clock_s: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    if hasattr(time, "CLOCK_BOOTTIME")
    else time.monotonic
)

log = logging.getLogger("asyncq.broker")


def batch_of(sizes: Iterable[int]) -> int:
    """Return how many of the things with these sizes, in bytes, go into one call: at least one."""
    total = 0
    for n, size in enumerate(sizes):
        total += size
        if n == BATCH or (n and total > BATCH_BYTES):
            return n
    return BATCH


@dataclass(slots=True)
class NewTask:
    """A task to be put on a queue.

    `at_ms`: unix milliseconds when it is due, `None` for now. `lock`: the whole key of its
    uniqueness lock, held for `lock_s` seconds. `new_id`: the id was made for it, so that no other
    task can have it.
    """

    id: str
    type: str
    message: bytes
    new_id: bool = False
    at_ms: int | None = None
    group: str | None = None
    lock: str | None = None
    lock_s: int = 0

    @property
    def special(self) -> bool:
        """Whether it is more than a task that is due now."""
        return self.at_ms is not None or self.group is not None or self.lock is not None

    def extra(self) -> str:
        if not self.special:
            return ""
        fields = {"at": self.at_ms, "group": self.group, "lock": self.lock, "lock_s": self.lock_s}
        return json.dumps({name: value for name, value in fields.items() if value is not None})


@dataclass(slots=True)
class Request:
    """What a pump asks of one queue: to save outcomes, and for up to `want` tasks.

    A request whose answer was lost is sent again as it is: by `sequence` the script knows it.
    `outcomes` are those that it saves, for the case that Redis refuses it. `command` is how it
    is sent, once it is written. `held`: Redis holds it until there is a task, see `receive`.
    """

    queue: str
    sequence: int
    want: int = 0
    outcomes: list[Ended] = field(default_factory=list[Ended])
    done: list[Arg] = field(default_factory=list[Arg])
    moves: list[Arg] = field(default_factory=list[Arg])
    command: Command | None = None
    held: bool = False

    def save(self, task_id: str, mark: int, lock: str, outcome: Outcome) -> None:
        """Add an outcome; `lock` is the key of the task's uniqueness lock, or empty."""
        if outcome.kind == "done" and not lock:
            self.done += (task_id, mark)
            return
        result = b"" if outcome.result is None else b"=" + outcome.result
        self.moves += (outcome.kind, task_id, mark, outcome.at, outcome.message, lock, result)

    def save_from(self, ended: deque[Ended], most: int = BATCH) -> None:
        """Take and add as many outcomes as go into one call."""
        size = 0
        while ended and len(self.outcomes) < min(most, BATCH) and size < BATCH_BYTES:
            one = task_id, mark, lock, outcome = ended.popleft()
            self.outcomes.append(one)
            if outcome is DONE and not lock:  # nearly all, and then the call is what costs
                self.done += (task_id, mark)
                continue
            self.save(task_id, mark, lock, outcome)
            size += len(outcome.message) + len(outcome.result or b"")


class Answered(NamedTuple):
    """What a queue answered a pump; times are Redis's own.

    `refused`: ids whose lease was no longer held. `broken`: (id, error) of outcomes that Redis
    could not save. `ghosts`: ids in pending without a task.
    """

    now: float
    mark: int
    refused: list[str]
    broken: list[tuple[str, str]]
    ghosts: list[str]
    ids: list[str]
    messages: list[bytes]
    more: bool  # is pending


class Expired(NamedTuple):
    """A task whose run is gone, or never began; as found in its lease and its hash.

    `score` and `message` are empty where there is none. `state` is what the hash calls it:
    without a lease, "pending" is one that Redis moved for a client that was gone by then.
    """

    id: str
    score: bytes
    message: bytes
    state: bytes


class Forwarded(NamedTuple):
    """How many tasks came due, and in how many seconds the next will (`None`: none waits)."""

    moved: int
    next_in_s: float | None


class Broker:
    """One Redis, as the place where tasks wait, run and end."""

    def __init__(self, url: str) -> None:
        self.pool = Pool(url)

    async def open(self) -> None:
        """Connect; see `Pool.open` for what it raises."""
        await self.pool.open()

    async def close(self) -> None:
        """Close every connection."""
        await self.pool.close()

    async def enqueue(
        self, queue: str, tasks: Sequence[NewTask], *, soon: bool = False
    ) -> list[AsyncqError | None]:
        """Put up to `BATCH` tasks on a queue; the answer tells for each why it was refused.

        The queue's name is announced each time: another process may have deleted it. For `soon`
        see `Pool.call`.
        """
        try:
            if _need_no_look(tasks):
                announced, *answers = await self.pool.call(*_push(queue, tasks), soon=soon)
                refused = await self._pushed(queue, tasks, answers)
            else:
                extras = [task.extra() for task in tasks]
                special = len(extras) - extras.count("")
                rows: list[Arg] = []
                for task, extra in zip(tasks, extras, strict=True):
                    rows += (task.id, task.message, extra)
                enqueue = _script("enqueue", queue)(special=special, tasks=rows)
                announced, answer = await self.pool.call(_announcement(queue), enqueue, soon=soon)
                refused = _refusals(queue, tasks, answer)
        except ConnectionLostError as error:
            if not error.sent:
                return [error] * len(tasks)
            return [EnqueueUncertainError(t.id, queue, str(error.__cause__)) for t in tasks]
        except BrokerError as error:
            return [error] * len(tasks)
        if isinstance(announced, BrokerError) and None in refused:  # only lists will not show it
            log.error("queue %r could not be made known: %s", queue, announced)
        return refused

    async def _pushed(
        self, queue: str, tasks: Sequence[NewTask], answers: list[Answer]
    ) -> list[AsyncqError | None]:
        begun, *queued, done = answers
        if isinstance(begun, BrokerError):  # no transaction for us, so each ran by itself
            done = queued
        if isinstance(done, BrokerError):  # nothing was done, and before that it was said why
            refused = next((one for one in queued if isinstance(one, BrokerError)), done)
            return [refused] * len(tasks)
        failed = next((one for one in done if not isinstance(one, int)), None)
        if failed is None:
            return [None] * len(tasks)
        k = queue_keys(queue)
        if any(isinstance(one, int) for one in done):
            # What is in no list must not stay; an id without a task is dropped by who takes it.
            try:
                await self.pool.ask(["UNLINK", *(k.task(task.id) for task in tasks)])
            except BrokerError as problem:
                log.error("queue %r: hashes of refused tasks may have stayed: %s", queue, problem)
        error = failed if isinstance(failed, BrokerError) else refusal(str(failed))
        if str(error).startswith("WRONGTYPE"):
            error = BrokerError(f"WRONGTYPE {k.pending} is no list: another program uses this key")
        return [error] * len(tasks)

    async def pump(
        self, server_id: str, requests: Sequence[Request]
    ) -> list[Answered | BrokerError]:
        """Save outcomes and take tasks, each queue in one call, all calls in one write.

        Raises:
            BrokerUnavailableError: no answer came; the same requests may be sent again.
        """
        for request in requests:
            if request.command is None:
                last = queue_keys(request.queue).last(server_id)
                request.command = _script("pump", request.queue, last)(
                    sequence=request.sequence,
                    want=request.want,
                    done=request.done,
                    moves=request.moves,
                )
        try:
            answers = await self.pool.call(*[cast(Command, r.command) for r in requests])
        except BrokerUnavailableError:
            for request in requests:
                request.command = None  # see `receive`: pump.lua knows what the last one took
            raise
        return [_read(answer) for answer in answers]

    def receive(
        self,
        server_id: str,
        request: Request,
        on_answer: Callable[[Answered | BrokerError, bool], None],
    ) -> EndWait | None:
        """Send a request for one task, which Redis answers when there is one, or in `WAIT_S`.

        The task is moved by Redis itself, which wakes one waiting client for each task that is
        put on the queue, and taken by the script that stands behind: so the news of a task is
        the task itself, and nobody else is woken by it.

        Returns what ends the wait, so that the answer comes, or None: not possible now.
        `on_answer` gets the answer, and whether it was in vain: waiting again at once would bring
        nothing either. Where the answer is unavailable the request is to be sent again, by `pump`.
        """
        k = queue_keys(request.queue)
        request.command = _script("receive", request.queue, k.last(server_id))(
            sequence=request.sequence
        )
        began = _clock_s()

        def answered(answers: Waited) -> None:
            if _clock_s() - began > TOO_LATE_S:
                late = TimeoutError("the answer lay there while this process stood still")
                answers = ConnectionLostError(late, self.pool.where, sent=True)
            if isinstance(answers, BrokerError):
                request.command = None  # an ordinary call then, which gives what is still held
                on_answer(answers, False)
                return
            moved, taken = answers
            answer = _read(taken)
            brought = isinstance(answer, Answered) and bool(answer.ids)
            on_answer(answer, moved is not None and not brought)

        move: list[Arg] = ["BLMOVE", k.pending, k.active, "RIGHT", "LEFT", WAIT_S]
        return self.pool.wait(move, request.command, on_answers=answered)

    async def forward(self, queue: str, limit: int = BATCH) -> Forwarded:
        """Move up to `limit` due tasks to pending, or to their group."""
        moved, next_ms, now_ms = await self._one(_script("forward", queue)(limit=limit))
        next_in_s = max(0.0, (float(next_ms) - float(now_ms)) / 1000) if next_ms else None
        return Forwarded(moved, next_in_s)

    async def extend(self, queue: str, runs: Sequence[tuple[str, int]]) -> list[str]:
        """Extend the leases of runs, given as (id, mark); return the ids that lost theirs."""
        lost: list[str] = []
        for start in range(0, len(runs), BATCH):
            rows: list[Arg] = [part for run in runs[start : start + BATCH] for part in run]
            ids = await self._one(_script("extend", queue)(runs=rows))
            lost += [text(task_id) for task_id in ids]
        return lost

    async def expired(self, queue: str, limit: int = BATCH) -> list[Expired]:
        """Find tasks whose run is gone: the lease has ended, or there is none."""
        found = await self._one(_script("expired", queue)(limit=limit))
        return [Expired(text(task_id), *fields) for task_id, *fields in found]

    async def recover(
        self, queue: str, moves: Iterable[tuple[Expired, str, int | str, bytes]]
    ) -> int:
        """Move tasks on, given as (found, kind, when due in unix ms or "now", new message).

        A task whose lease is not as it was found is left alone.
        """
        rows: list[Arg] = []
        for found, kind, at, message in moves:
            rows += (kind, found.id, found.score, at, message)
        moved, broken = await self._one(_script("recover", queue)(moves=rows))
        for task_id, error in broken:
            log.error(
                "task %r of queue %r could not be recovered: %s",
                text(task_id), queue, error.decode(errors="replace"),
            )  # fmt: skip
        return int(moved)

    async def expire_completed(self, queue: str, limit: int = BATCH) -> int:
        """Delete up to `limit` completed tasks whose retention has ended."""
        deleted: int = await self._one(_script("expire", queue)(limit=limit))
        return deleted

    async def annotate(self, queue: str, task_id: str, mark: int, name: str, value: bytes) -> bool:
        """Write a field of a running task; False when the run no longer holds the lease."""
        task = queue_keys(queue).task(task_id)
        written = await self._one(
            _script("annotate", queue)(task=task, id=task_id, mark=mark, field=name, value=value)
        )
        return bool(written)

    async def announce(
        self,
        server: str,
        workers: str,
        expires_at: int,
        info: bytes,
        running: Mapping[str, bytes],
    ) -> None:
        """Write a server's record and those of its running tasks, for `SERVER_TTL_S` seconds."""
        await self._one(
            ["ZADD", keys.SERVERS, expires_at, server],
            ["ZADD", keys.WORKERS, expires_at, workers],
            SCRIPTS["announce"].on({"server": server, "workers": workers})(
                ttl_s=SERVER_TTL_S,
                info=info,
                running=[part for worker in running.items() for part in worker],
            ),
        )

    async def withdraw(self, server: str, workers: str) -> None:
        """Remove a server's records."""
        await self._one(
            ["ZREM", keys.SERVERS, server],
            ["ZREM", keys.WORKERS, workers],
            ["DEL", server],
            ["DEL", workers],
        )

    async def cancel(self, task_id: str, *, retry: bool) -> None:
        """Ask whoever runs a task to cancel it; without `retry` our workers archive it then."""
        publish: list[Sequence[Arg]] = [["PUBLISH", keys.CANCEL, task_id]]
        if not retry:  # first, on the same connection: a worker acts on what it hears first
            publish.insert(0, ["PUBLISH", keys.CANCEL_FINALLY, task_id])
        await self._one(*publish)

    async def ping(self) -> None:
        """See that Redis answers."""
        await self._one(["PING"])

    async def _one(self, *commands: Sequence[Arg] | Command) -> Any:
        """Send commands that belong together; return the last answer or raise the first error."""
        return (await self.pool.ask(*commands))[-1]


@lru_cache(maxsize=4096)
def _script(name: str, queue: str, last: str = "") -> Call:
    script, k = SCRIPTS[name], queue_keys(queue)
    its_keys = {key: last if key == "last" else getattr(k, key) for key in script.keys}
    prefix = {"prefix": k.prefix} if "prefix" in script.scalars else {}
    return script.on(its_keys, **prefix)


@lru_cache(maxsize=4096)
def _announcement(queue: str) -> bytes:
    return pack(["SADD", keys.QUEUES, queue])


def _need_no_look(tasks: Sequence[NewTask]) -> bool:
    for task in tasks:  # noqa: SIM110 - of one task, a generator would be most of the cost
        if not task.new_id or task.special:
            return False
    return True


@lru_cache(maxsize=4096)
def _begins(queue: str) -> tuple[bytes, bytes]:
    """How the key of each of its tasks begins; how a push of their ids does, after its length."""
    k = queue_keys(queue)
    return k.task("").encode(), pack(["LPUSH", k.pending]).removeprefix(b"*2\r\n")


def _push(queue: str, tasks: Sequence[NewTask]) -> list[bytes]:
    """New tasks that need no look at what is there: a transaction costs Redis less than a script.

    As Go's client does, it takes its own clock for `pending_since`, which is only shown.
    """
    since = b"%d" % time.time_ns()
    key, push = _begins(queue)
    commands, pushed = [_announcement(queue), _MULTI], [b"*%d\r\n" % (len(tasks) + 2), push]
    for task in tasks:
        task_id, message = task.id.encode(), task.message
        its_key = key + task_id
        commands.append(
            _NEW_HASH % (len(its_key), its_key, len(message), message, len(since), since)
        )
        pushed.append(PART % (len(task_id), task_id))
    commands += (b"".join(pushed), _EXEC)
    return commands


def _refusals(queue: str, tasks: Sequence[NewTask], answer: Answer) -> list[AsyncqError | None]:
    if isinstance(answer, BrokerError):
        return [answer] * len(tasks)
    refused: list[AsyncqError | None] = [None] * len(tasks)
    refusals: list[tuple[int, bytes, bytes]] = answer
    for row, reason, holder in refusals:
        refused[row - 1] = _refusal(tasks[row - 1], queue, reason, text(holder))
    return refused


def _refusal(task: NewTask, queue: str, reason: bytes, holder: str) -> AsyncqError:
    match reason:
        case b"conflict":
            return TaskIDConflictError(task.id, queue)
        case b"duplicate":
            return DuplicateTaskError(task.type, queue, holder, task.lock or "")
        case _:
            return BrokerError(f"WRONGTYPE {holder} is no group: another program uses this key")


def _read(answer: Answer) -> Answered | BrokerError:
    return answer if isinstance(answer, BrokerError) else _answered(answer)


def _answered(answer: list[Any]) -> Answered:
    now_us, mark, refused, broken, ghosts, ids, messages, more = answer
    return Answered(
        now_us / 1e6,
        mark,
        [*map(text, refused)],
        [(text(task_id), error.decode(errors="replace")) for task_id, error in broken],
        [*map(text, ghosts)],
        [*map(text, ids)],
        messages,
        bool(more),
    )
