"""Every key and what it holds: Asynq v0.26.0's, and our own, which start with asyncq."""

from __future__ import annotations

from functools import lru_cache

QUEUES = "asynq:queues"  # set: the names of all queues ever used
SERVERS = "asynq:servers"  # zset: key of a server → unix seconds when its record ends
WORKERS = "asynq:workers"  # zset: key of a server's running tasks → the same instant
CANCEL = "asynq:cancel"  # channel: the id of a task to cancel
CANCEL_FINALLY = "asyncq:cancel"  # channel: the id of a task to cancel and archive, for our workers


def server(host: str, pid: int, server_id: str) -> str:
    """String: the `ServerInfo` of one server; the braces put it in one slot with its workers."""
    return f"asynq:servers:{{{host}:{pid}:{server_id}}}"


def workers(host: str, pid: int, server_id: str) -> str:
    """Hash: task id → `WorkerInfo`, for what one server is running."""
    return f"asynq:workers:{{{host}:{pid}:{server_id}}}"


class QueueKeys:
    """The keys of one queue, all in one cluster slot; scripts name them by these attributes."""

    __slots__ = (
        "active",
        "archived",
        "completed",
        "due",
        "failed",
        "groups",
        "lease",
        "mark",
        "own_prefix",
        "paused",
        "pending",
        "prefix",
        "processed",
        "queue",
        "retry",
        "scheduled",
    )

    def __init__(self, queue: str) -> None:
        self.queue = queue
        self.prefix = prefix = f"asynq:{{{queue}}}:"
        self.own_prefix = own = f"asyncq:{{{queue}}}:"
        self.pending = prefix + "pending"  # list of ids; enter at the head, taken from the tail
        self.active = prefix + "active"  # list of ids being worked on
        self.lease = prefix + "lease"  # zset: id → unix seconds when its lease ends, and our mark
        self.scheduled = prefix + "scheduled"  # zset: id → unix seconds when due
        self.retry = prefix + "retry"  # zset: id → unix seconds when due
        self.archived = prefix + "archived"  # zset: id → unix seconds when archived
        self.completed = prefix + "completed"  # zset: id → unix seconds when it may be deleted
        self.paused = prefix + "paused"  # string: exists while the queue is paused
        self.processed = prefix + "processed"  # string: finished attempts; ":<date>" for a UTC day
        self.failed = prefix + "failed"  # string: failed attempts; ":<date>" for a UTC day
        self.groups = prefix + "groups"  # set: the groups with waiting tasks
        self.due = own + "due"  # zset: id → unix milliseconds when due, for what we scheduled
        self.mark = own + "mark"  # string: counts fetches; a lease carries its fetch's number

    def task(self, task_id: str) -> str:
        """Hash: msg, state, pending_since, unique_key, group, result; ours: progress, raw."""
        return f"{self.prefix}t:{task_id}"

    def group(self, group: str) -> str:
        """Zset: id → unix seconds when it joined the group."""
        return f"{self.prefix}g:{group}"

    def unique(self, task_type: str, digest: str) -> str:
        """String: the id of the task that holds this uniqueness lock."""
        return f"{self.prefix}unique:{task_type}:{digest}"

    def last(self, hand: str) -> str:
        """String: what the last pump call of a hand of the pump was answered (60 s)."""
        return f"{self.own_prefix}last:{hand}"


@lru_cache(maxsize=4096)
def queue_keys(queue: str) -> QueueKeys:
    """Return the keys of a queue, made once a name."""
    return QueueKeys(queue)
