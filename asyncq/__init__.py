"""An asyncio task queue on Redis or Valkey that shares its queues with Go Asynq."""

from __future__ import annotations

from asyncq.client import Client, EnqueueMiddleware, EnqueueNext
from asyncq.clock import Seconds
from asyncq.context import Context, SyncContext, current_context
from asyncq.errors import (
    AsyncqError,
    BrokerError,
    BrokerFullError,
    BrokerUnavailableError,
    DuplicateTaskError,
    EnqueueUncertainError,
    HandlerNotFoundError,
    InvalidPayloadError,
    LeaseExpiredError,
    MalformedMessageError,
    OptionError,
    PayloadError,
    PayloadTooLargeError,
    ProcessDiedError,
    QueueNotEmptyError,
    QueueNotFoundError,
    ServerClosedError,
    TaskFailedError,
    TaskIDConflictError,
    TaskNotFoundError,
)
from asyncq.handler import Handler, HandlerOptions, Next, RunOptions
from asyncq.inspector import Inspector, QueueInfo
from asyncq.mux import Middleware, Mux
from asyncq.options import TaskOptions, TypeOptions
from asyncq.retry import (
    Retry,
    RetryDelay,
    RevokeTask,
    SkipRetry,
    Snooze,
    asynq_delay,
    exponential,
    fixed,
)
from asyncq.server.server import Server
from asyncq.sync_client import SyncClient, SyncTaskHandle
from asyncq.task import Progress, Task, TaskHandle, TaskInfo, TaskState, TaskType

__all__ = [
    # Clients
    "Client",
    "EnqueueMiddleware",
    "EnqueueNext",
    "SyncClient",
    "SyncTaskHandle",
    # The worker
    "Server",
    # Looking at queues
    "Inspector",
    "QueueInfo",
    # Tasks
    "Progress",
    "Task",
    "TaskHandle",
    "TaskInfo",
    "TaskState",
    "TaskType",
    # Handlers
    "Context",
    "Handler",
    "Middleware",
    "Mux",
    "Next",
    "SyncContext",
    "current_context",
    # Raised by a handler
    "Retry",
    "RevokeTask",
    "SkipRetry",
    "Snooze",
    # Retry delays
    "RetryDelay",
    "asynq_delay",
    "exponential",
    "fixed",
    # Options
    "HandlerOptions",
    "RunOptions",
    "Seconds",
    "TaskOptions",
    "TypeOptions",
    # Errors
    "AsyncqError",
    "BrokerError",
    "BrokerFullError",
    "BrokerUnavailableError",
    "DuplicateTaskError",
    "EnqueueUncertainError",
    "HandlerNotFoundError",
    "InvalidPayloadError",
    "LeaseExpiredError",
    "MalformedMessageError",
    "OptionError",
    "PayloadError",
    "PayloadTooLargeError",
    "ProcessDiedError",
    "QueueNotEmptyError",
    "QueueNotFoundError",
    "ServerClosedError",
    "TaskFailedError",
    "TaskIDConflictError",
    "TaskNotFoundError",
]
