"""For the tests of programs that use asyncq: contexts for handlers, and a real store.

Handlers are functions, so a unit test calls them, with a context of `make_context`. For what
needs queues there is no double of Redis but a real store, which starts in a tenth of a second:
say `pytest_plugins = ["asyncq.testing"]` in your top conftest.py, and a test that takes
`asyncq_url` has one of its own (extra: embedded). The plugin is not registered by installing
asyncq, because pytest would then import it in every run of every project.

This module needs pytest. (It asserts nothing: PYTEST_DONT_REWRITE.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from urllib.parse import quote

import pytest
from typing_extensions import TypeVar

from asyncq import (
    AsyncqError,
    Client,
    Context,
    LeaseExpiredError,
    OptionError,
    Progress,
    SyncClient,
    Task,
)

__all__ = ["RecordingContext", "asyncq_url", "make_context"]

S = TypeVar("S", default=Any)

_TIMEOUT_S = 1800  # of a task that was enqueued with neither timeout nor deadline
_NO_STATE: Any = None


class RecordingContext(Context[S]):
    """A context that no server made: it keeps what a handler reports, for the test to read.

    Once the test has set `lease_lost`, reporting raises LeaseExpiredError, as in a worker whose
    task was taken over.
    """

    def __init__(self, run: _Run) -> None:
        # It has all that a Context reads; the message of a real one is of protobuf.
        super().__init__(cast(Any, run))
        self._recorded = run

    @property
    def reports(self) -> list[Progress]:
        """What `progress` was called with, in order; equal to tuples (fraction, note)."""
        return self._recorded.reports

    @property
    def written(self) -> bytes | None:
        """What `write_result` stored last, as the store would hold it; None: nothing."""
        return self._recorded.written

    @property
    def client(self) -> Client:
        """The client that `make_context` was given.

        Raises:
            AsyncqError: it was given none.
        """
        if self._recorded.client is None:
            raise AsyncqError(
                "this context has no client: give it one that is open, "
                "make_context(client=client), on the store of the fixture asyncq_url"
            )
        return self._recorded.client


def make_context(
    *,
    task_id: str = "test",
    task_type: str = "test",
    payload: object = None,
    queue: str = "default",
    retry_count: int = 0,
    max_retry: int = 25,
    deadline: datetime | None = None,
    headers: Mapping[str, str] | None = None,
    state: S = _NO_STATE,
    client: Client | None = None,
    cancel_reason: str | None = None,
) -> RecordingContext[S]:
    """Make the context of a run that never was, to call a handler with.

    `payload` is what `ctx.task` and middleware see; the handler gets what the test passes it.
    `deadline` is 30 minutes away if none is given.

    Raises:
        OptionError: a fact makes no sense, such as a blank queue or a naive deadline.
    """
    if retry_count < 0:
        raise OptionError(f"retry_count must not be negative, not {retry_count}")
    until = deadline or datetime.now(UTC) + timedelta(seconds=_TIMEOUT_S)
    checked = Task(
        task_type,
        payload,
        task_id=task_id,
        queue=queue,
        max_retry=max_retry,
        deadline=until,
        headers=headers or {},
    )
    message = _Message(
        id=task_id,
        type=task_type,
        payload=checked.payload or b"",
        queue=queue,
        retried=retry_count,
        retry=max_retry,
        headers=checked.headers,
        timeout=0 if deadline else _TIMEOUT_S,
        deadline=int(until.timestamp()) if deadline else 0,
    )
    return RecordingContext(_Run(message, until.timestamp(), state, client, cancel_reason))


@pytest.fixture
def asyncq_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty store of the test's own, for clients and workers; it ends with the test.

    `monkeypatch.setenv("ASYNCQ_REDIS_URL", asyncq_url)` gives it to a program that names none.
    """
    url = f"embedded://{quote(str(tmp_path_factory.mktemp('asyncq')))}"
    with SyncClient(url):  # holds the store open between the test's own clients
        yield url


@dataclass(frozen=True)
class _Message:
    """The fields of a stored task that a Context reads, by their names there."""

    id: str
    type: str
    payload: bytes
    queue: str
    retried: int
    retry: int
    headers: Mapping[str, str]
    timeout: int
    deadline: int
    retention: int = 0
    group_key: str = ""


class _Run:
    """What a Context is a view of: in a server one execution of a task, here what a test says."""

    def __init__(
        self,
        message: _Message,
        deadline_at: float,
        state: Any,
        client: Client | None,
        cancel_reason: str | None,
    ) -> None:
        self.message = message
        self.deadline_at = deadline_at
        self.state = state
        self.client = client
        self.cancel_reason = cancel_reason
        self.lease_lost = asyncio.Event()
        self.reports: list[Progress] = []
        self.written: bytes | None = None

    async def write_result(self, data: bytes) -> None:
        self._check_lease()
        self.written = data

    async def write_progress(self, fraction: float, note: str) -> None:
        self._check_lease()
        self.reports.append(Progress(fraction, note))

    def sync_call(self, function: Callable[..., Awaitable[None]], /, *args: Any) -> None:
        # The two never wait, so this works without an event loop, and inside a running one.
        for _ in function(*args).__await__():
            pass

    def _check_lease(self) -> None:
        if self.lease_lost.is_set():
            raise LeaseExpiredError
