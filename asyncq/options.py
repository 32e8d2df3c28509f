"""The options of tasks, types and handlers: which there are, their checks, how layers merge."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, TypedDict, cast

from asyncq.clock import Seconds, seconds, to_unix
from asyncq.errors import OptionError

DEFAULT_QUEUE = "default"
DEFAULT_MAX_RETRY = 25
DEFAULT_TIMEOUT_S = 1800
_INT32_MAX = 2**31 - 1


class TypeOptions(TypedDict, total=False):
    """What may be said once for all tasks of a type; None takes an earlier layer's value away."""

    queue: str
    max_retry: int
    timeout: Seconds | None
    unique: Seconds | None
    retention: Seconds | None
    group: str | None
    headers: Mapping[str, str]


class TaskOptions(TypeOptions, total=False):
    """What may be said of one task, at `Task`, `.new` or `enqueue`."""

    task_id: str
    unique_key: str
    deadline: datetime
    process_at: datetime
    process_in: Seconds


FOR_TYPE = frozenset(TypeOptions.__optional_keys__)
FOR_TASK = frozenset(TaskOptions.__optional_keys__)

_ABSENT_IF_NONE = frozenset({"timeout", "unique", "retention", "group"})


def check_options(
    options: Mapping[str, Any], allowed: frozenset[str], where: str
) -> dict[str, Any]:
    """Return a copy of one layer of options, checked; `where` is what the errors call it.

    Raises:
        TypeError: an option is unknown, or not for this place.
        OptionError: a value makes no sense.
    """
    checked = dict(options)
    for name, value in checked.items():
        if name not in allowed:
            raise TypeError(_misplaced(name, allowed, where))
        if value is None and name in _ABSENT_IF_NONE:
            continue
        _CHECKS[name](value)
    if "process_at" in checked and "process_in" in checked:
        raise OptionError(f"{where}: give process_at or process_in, not both")
    if "headers" in checked:
        checked["headers"] = dict(checked["headers"])
    return checked


def check_type_name(name: object) -> None:
    """Check the name of a task type.

    Raises:
        OptionError: it is no string, blank, or cannot be UTF-8.
    """
    _check_text(name, "task type")
    if not cast(str, name).strip():
        raise OptionError("task typename cannot be empty")


def merge_options(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge checked layers: the later wins, headers merge key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        if "process_at" in layer:
            merged.pop("process_in", None)
        elif "process_in" in layer:
            merged.pop("process_at", None)
        headers = merged.get("headers")
        merged.update(layer)
        if headers and "headers" in layer:
            merged["headers"] = {**headers, **layer["headers"]}
    return merged


@dataclass(frozen=True, slots=True)
class Plan:
    """The options of one enqueue, merged and in the units of a task message.

    Fractions of a second are cut where a message holds whole seconds, as Asynq does.
    """

    queue: str = DEFAULT_QUEUE
    max_retry: int = DEFAULT_MAX_RETRY
    timeout_s: int = DEFAULT_TIMEOUT_S
    deadline_unix: int = 0
    """0: none."""
    retention_s: int = 0
    """0: the task is deleted once it succeeded."""
    process_at_s: float | None = None
    """Unix seconds; None, or an instant that is over: at once."""
    unique_s: int | None = None
    unique_key: str | None = None
    """Stands in the lock for the payload's hash; None: the hash."""
    group: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    task_id: str | None = None
    """None: the client makes a UUID."""


DEFAULT_PLAN = Plan(headers=MappingProxyType({}))
"""That of a task without options."""


def resolve(*layers: Mapping[str, Any], now: float) -> Plan:
    """Merge checked layers of options into a plan; `process_in` counts from `now` (unix seconds).

    Raises:
        OptionError: `unique_key` without `unique`, which would lock nothing.
    """
    options = layers[0] if len(layers) == 1 else merge_options(*layers)
    if not options:
        return DEFAULT_PLAN
    get = options.get
    unique_key = get("unique_key")
    if unique_key is not None and "unique" not in options:
        raise OptionError(
            "unique_key does nothing alone: say with unique=... how long the lock is held"
        )
    deadline = get("deadline")
    # "Neither is set" is judged before fractions are cut (Asynq v0.26.0): a timeout of half a
    # second stores neither timeout nor deadline.
    timeout = _duration(get("timeout"))
    if not timeout and deadline is None:
        timeout = DEFAULT_TIMEOUT_S
    if "process_in" in options:
        process_at_s: float | None = now + _duration(options["process_in"])
    else:
        at = get("process_at")
        process_at_s = None if at is None else at.timestamp()
    unique = get("unique")
    return Plan(
        queue=get("queue", DEFAULT_QUEUE),
        max_retry=max(0, get("max_retry", DEFAULT_MAX_RETRY)),
        timeout_s=int(timeout),
        deadline_unix=0 if deadline is None else int(deadline.timestamp()),
        retention_s=int(_duration(get("retention"))),
        process_at_s=process_at_s,
        unique_s=None if unique is None else int(_duration(unique)),
        unique_key=None if unique is None else unique_key,
        group=get("group"),
        headers=get("headers") or DEFAULT_PLAN.headers,
        task_id=get("task_id"),
    )


def _duration(value: Seconds | None) -> float:
    if value is None:
        return 0.0
    return value.total_seconds() if isinstance(value, timedelta) else value


# The checks of each option


def _misplaced(name: str, allowed: frozenset[str], where: str) -> str:
    if name in FOR_TYPE:
        return (
            f"{where}: {name!r} belongs to the producer: give it to the TaskType, "
            "or to .new(...) or enqueue(...)"
        )
    if name in FOR_TASK:
        return f"{where}: {name!r} belongs to one task: give it to .new(...) or enqueue(...)"
    if name in _CHECKS:
        return f"{where}: {name!r} belongs to the worker: give it to @mux.task(...)"
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(allowed))}"
    return f"{where}: unknown option {name!r}: {hint}"


def _check_text(value: object, name: str) -> None:
    if not isinstance(value, str):
        raise OptionError(f"{name} must be a string, not {value!r}")
    if value.isascii():
        return
    try:
        value.encode()
    except UnicodeEncodeError:
        raise OptionError(f"{name} must be valid Unicode, {value!r} cannot be UTF-8") from None


def _text_check(name: str, blank: str) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        _check_text(value, name)
        if not value.strip():
            raise OptionError(blank)

    return check


def _duration_check(name: str, *, least: float | None = 0.0) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        seconds(value, name, least=least)

    return check


def _check_max_retry(value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise OptionError(f"max_retry must be a whole number, not {value!r}")
    if value > _INT32_MAX:
        raise OptionError(f"max_retry must not be more than {_INT32_MAX:,}, not {value:,}")


def _check_deadline(value: Any) -> None:
    if to_unix(value, "deadline") < 1:
        raise OptionError(f"deadline must be after 1970, not {value!r}")


def _check_process_at(value: Any) -> None:
    to_unix(value, "process_at")


def _check_headers(value: Any) -> None:
    if not isinstance(value, Mapping):
        raise OptionError(f"headers must be a mapping of strings to strings, not {value!r}")
    for key, text in cast(Mapping[object, object], value).items():
        _check_text(key, "a header's name")
        _check_text(text, f"header {key!r}")


def _check_executor(value: Any) -> None:
    if value not in ("thread", "process"):
        raise OptionError(f"executor must be 'thread' or 'process', not {value!r}")


def _check_retry_delay(value: Any) -> None:
    if not callable(value):
        seconds(value, "retry_delay")


def _check_is_failure(value: Any) -> None:
    if not callable(value):
        raise OptionError(f"is_failure must be a function of an exception, not {value!r}")


_CHECKS: dict[str, Callable[[Any], None]] = {
    "queue": _text_check("queue", "queue name must contain one or more characters"),
    "max_retry": _check_max_retry,  # negative means none, as in Asynq
    "timeout": _duration_check("timeout"),
    "unique": _duration_check("unique", least=1.0),
    "retention": _duration_check("retention"),
    "group": _text_check("group", "group key cannot be empty"),
    "headers": _check_headers,
    "task_id": _text_check("task_id", "task ID cannot be empty"),
    "unique_key": _text_check("unique_key", "unique_key cannot be empty"),
    "deadline": _check_deadline,
    "process_at": _check_process_at,
    # A delay that was reckoned from an instant may be over by now: that is "at once".
    "process_in": _duration_check("process_in", least=None),
    "executor": _check_executor,
    "retry_delay": _check_retry_delay,
    "is_failure": _check_is_failure,
}
