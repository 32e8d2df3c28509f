"""The systems that the benchmarks compare, and what a fair reader has to know of each.

Facts are of the releases that adapters/requirements and adapters/go pin.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).resolve().parent / ".peers"


@dataclass(frozen=True, slots=True)
class System:
    """One system, as its adapter in adapters/ runs it.

    `lacks` names ways of sending (`adapter.WAYS`) and workloads that it cannot do. `scale` is the
    share of a workload's tasks that it gets, so that a slow system does not hold up a round.
    `pace_s` is the pause between two tasks that are each to find the worker idle.
    """

    name: str
    title: str
    language: str
    distribution: str
    runs: str
    acknowledges: str
    acknowledging: str
    lacks: frozenset[str] = frozenset()
    scale: float = 1.0
    pace_s: float = 0.02
    note: str = ""

    @property
    def program(self) -> list[str]:
        """The command that runs its adapter, whether that is installed or not."""
        if self.language == "Go":
            return [str(PEERS / self.name / "adapter")]
        own = PEERS / self.name / "bin" / "python"
        python = str(own) if self.is_peer else sys.executable
        return [python, "-m", f"benchmarks.adapters.{self.name}"]

    @property
    def is_floor(self) -> bool:
        """Whether it is no system, but what floor.py measures of the machine itself."""
        return self.name == "floor"

    @property
    def is_peer(self) -> bool:
        """Whether it is a system of others."""
        return self.name != "ours" and not self.is_floor

    @property
    def installed(self) -> bool:
        """Whether its program is there."""
        return Path(self.program[0]).exists()


OURS = System(
    name="ours",
    title="asyncq",
    language="Python",
    distribution="asyncq",
    runs="coroutines",
    acknowledges="after",
    acknowledging="A task leaves Redis in the script call that acknowledges its finished run;"
    " a crash loses nothing, another worker takes its tasks when their leases have run out.",
    note="Who enqueues one task after the other keeps the event loop turning until the answer is"
    " there, as long as Redis answers within 0.2 ms; the CPU time a task shows what that costs.",
)

ASYNQ = System(
    name="asynq",
    title="Go Asynq",
    language="Go",
    distribution="github.com/hibiken/asynq",
    runs="goroutines",
    acknowledges="after",
    acknowledging="A task leaves Redis in the script call that acknowledges its finished run;"
    " a crash loses nothing, another worker takes its tasks when their leases have run out.",
    lacks=frozenset({"bulk"}),
    note="Looks at empty queues every 10 ms instead of every second, and at scheduled tasks and"
    " retries every second instead of every 5 s. Their instants are cut to whole seconds, so that"
    " tasks start early too. `RetryDelayFunc` returns 0.",
)

SAQ = System(
    name="saq",
    title="SAQ",
    language="Python",
    distribution="saq",
    runs="coroutines",
    acknowledges="after",
    acknowledging="A job leaves Redis in a transaction after its run. After a crash a sweep, once a"
    " minute, queues again what is past its timeout of 10 s and has attempts left, as here; with"
    " the default of one attempt such jobs are lost.",
    lacks=frozenset({"bulk"}),
    scale=0.25,
    note="`orjson` for payloads, no results stored. Looks for scheduled jobs once a second, the"
    " least it can.",
)

ARQ = System(
    name="arq",
    title="arq",
    language="Python",
    distribution="arq",
    runs="coroutines",
    acknowledges="after",
    acknowledging="A job leaves Redis in a transaction after its run. A crash loses nothing; jobs"
    " run again 10 s after their timeout, 310 s after their start by default.",
    lacks=frozenset({"bulk"}),
    scale=0.2,
    note="Polls every 10 ms instead of every 0.5 s, no results stored. Retries only its own"
    " exception, which the failing handler raises.",
)

STREAQ = System(
    name="streaq",
    title="streaQ",
    language="Python",
    distribution="streaq",
    runs="coroutines",
    acknowledges="after",
    acknowledging="A task leaves its stream in a transaction after its run. A crash loses nothing;"
    " a worker claims what has been idle for a minute by default, prefetched tasks too.",
    scale=0.17,
    note="The optimized mode of its Redis client, no results stored. Looks for scheduled tasks, and"
    " retries, every 0.5 s, which is fixed. Retries only its own exception.",
)

TASKIQ = System(
    name="taskiq",
    title="taskiq",
    language="Python",
    distribution="taskiq-redis",
    runs="coroutines",
    acknowledges="after",
    acknowledging="A message is acknowledged after its run, and stays in the stream, which nothing"
    " trims by default. A crash loses nothing; a worker claims what has been idle for 10 minutes"
    " by default, but looks for it only when it has read a new message.",
    lacks=frozenset({"bulk"}),
    scale=0.35,
    note="`RedisStreamBroker`, messages formatted by Pydantic, arguments not parsed again, no"
    " results. Its scheduler looks once a second, the least it can, in the worker's process.",
)

DRAMATIQ = System(
    name="dramatiq",
    title="dramatiq",
    language="Python",
    distribution="dramatiq",
    runs="greenlets",
    acknowledges="after",
    acknowledging="A message leaves Redis in the script call that acknowledges its finished run."
    " A crash loses nothing; at one in a thousand of its commands another process takes over"
    " from those that have shown no life for a minute.",
    lacks=frozenset({"bulk"}),
    scale=0.4,
    note="`dramatiq-gevent`, which its documentation advises for tasks that wait: one worker"
    " process. Holds 1000 messages instead of 200, and polls an empty queue every 20 ms instead"
    " of every second.",
)

CELERY = System(
    name="celery",
    title="Celery",
    language="Python",
    distribution="celery",
    runs="threads",
    acknowledges="after",
    acknowledging="With `task_acks_late`, as here, a task leaves Redis in a transaction after its"
    " run. A crash loses nothing; what is not acknowledged an hour after its delivery is queued"
    " again. By default a task leaves Redis just before it runs, and a crash loses what runs.",
    scale=0.15,
    note="The pool of threads, the fastest of its pools at tasks that wait;"
    " `worker_prefetch_multiplier` 128, no results. Bulk is Kombu's batch of messages.",
)

REPID = System(
    name="repid",
    title="repid",
    language="Python",
    distribution="repid",
    runs="coroutines",
    acknowledges="after",
    acknowledging="A message is acknowledged after its run, and stays in the stream, which nothing"
    " trims by default. After a crash a worker claims what has been idle for a minute, where it"
    " was told to, as here; by default such messages stay with the dead worker for good.",
    lacks=frozenset({"bulk", "scheduled"}),
    note="Without Pydantic, so payloads are not validated; no timeout and no keep-alive,"
    " which cost it a coroutine each for a message. A retry goes to the end of the stream.",
)

RQ = System(
    name="rq",
    title="rq",
    language="Python",
    distribution="rq",
    runs="processes",
    acknowledges="after",
    acknowledging="A job leaves the list of those running in a transaction after its run. After a"
    " crash it is queued again when its timeout, 180 s, and a minute have passed and a worker"
    " starts, or looks, once in ten minutes; but only if it has a retry left, as here, and it stays"
    " among the failed as well. By default it counts as failed, and does not run again.",
    scale=0.04,
    note="A pool of `SimpleWorker` processes, five a core whatever the concurrency, since more did"
    " less: a fork a job, its default, took ten times the CPU. Looks for scheduled jobs once a"
    " second, and cuts their instants to whole seconds, so that jobs start early too.",
)

HUEY = System(
    name="huey",
    title="huey",
    language="Python",
    distribution="huey",
    runs="greenlets",
    acknowledges="before",
    acknowledging="A task leaves Redis when a worker takes it, and nothing is acknowledged: a"
    " crash loses all tasks that run.",
    lacks=frozenset({"bulk"}),
    scale=0.3,
    note="Greenlets, which its documentation advises for tasks that wait; no results. Looks for"
    " scheduled tasks once a second, the least it can.",
)

SYSTEMS = {
    system.name: system
    for system in (OURS, ASYNQ, REPID, SAQ, STREAQ, TASKIQ, ARQ, DRAMATIQ, CELERY, RQ, HUEY)
}
