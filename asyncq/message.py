"""What Redis stores of a task: reading it without trusting it, and rewriting it after a run."""

from __future__ import annotations

from typing import Final

from google.protobuf.message import DecodeError

from asyncq.errors import MalformedMessageError
from asyncq.proto.asynq_pb2 import TaskMessage

__all__ = ["TaskMessage", "completed", "decode", "failed", "quarantined"]

MALFORMED_TYPE: Final = "asyncq:malformed"
"""The type under which Go's tools list a task whose bytes were no message."""

RAW_SHOWN_BYTES: Final = 64 * 1024
ERROR_LIMIT: Final = 16 * 1024  # characters of an error kept with the task, and sent to it each run


def decode(task_id: str, queue: str, raw: bytes) -> TaskMessage:
    """Read the message of a task.

    Raises:
        MalformedMessageError: the bytes are no message, or that of another task. What a run
            ends with is written by the message's own id and queue, so these must be right.
    """
    try:
        message = TaskMessage.FromString(raw)
    except DecodeError as error:
        raise MalformedMessageError(f"no task message: {error}") from None
    if message.id != task_id or message.queue != queue:
        raise MalformedMessageError(
            f"the message names task {message.id[:100]!r} of queue {message.queue[:100]!r}"
        )
    return message


def completed(message: TaskMessage, now_s: int) -> bytes:
    """Return the message of a task that was handled at `now_s`, in unix seconds."""
    message.completed_at = now_s
    return message.SerializeToString()


def failed(message: TaskMessage, error: str, now_s: int, *, retried: bool) -> bytes:
    """Return the message after a failure at `now_s`; `retried` if the failure counts as a try."""
    message.error_msg = _text(error)
    message.last_failed_at = now_s
    if retried:
        message.retried += 1
    return message.SerializeToString()


def quarantined(task_id: str, queue: str, raw: bytes, reason: str, now_s: int) -> bytes:
    """Return a message that Go can read, to stand for bytes that it could not."""
    return TaskMessage(
        type=MALFORMED_TYPE,
        id=_text(task_id),
        queue=queue,
        payload=raw[:RAW_SHOWN_BYTES],
        error_msg=_text(f"asyncq: quarantined: {reason}"),
        last_failed_at=now_s,
    ).SerializeToString()


def _text(text: str) -> str:
    # Go cannot write a message with invalid UTF-8, which would leave the task to its lease.
    return text[:ERROR_LIMIT].encode("utf-8", "backslashreplace").decode()
