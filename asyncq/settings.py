"""What a program is told from outside: the `ASYNCQ_*` variables, and flags before them.

Whoever passes arguments in code needs none of this. It is read when a client gets no URL, and
by the worker command.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from asyncq.errors import OptionError

__all__ = ["ClientSettings", "Settings", "parse_queues", "redis_url"]

PREFIX = "ASYNCQ_"


def parse_queues(pairs: Iterable[str]) -> dict[str, int]:
    """Turns `NAME=WEIGHT` pairs into queues with their weights; a `NAME` alone weighs 1.

    Raises:
        OptionError: If a name is blank or named twice, or a weight is no whole number from 1 up.
    """
    queues: dict[str, int] = {}
    for pair in pairs:
        name, equals, weight = (part.strip() for part in pair.partition("="))
        if not name:
            raise OptionError(f"{pair!r} names no queue: write NAME or NAME=WEIGHT")
        if name in queues:
            raise OptionError(f"queue {name!r} is named twice")
        if not equals:
            weight = "1"
        if not (weight.isascii() and weight.isdigit() and int(weight) > 0):
            raise OptionError(
                f"queue {name!r} has the weight {weight!r}: a weight is a whole number from 1 up"
            )
        queues[name] = int(weight)
    return queues


def _queues_of_text(value: object) -> object:
    return parse_queues(value.split(",")) if isinstance(value, str) else value


def _lower_case(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


Queues = Annotated[dict[str, int], NoDecode, BeforeValidator(_queues_of_text)]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]
LogFormat = Literal["text", "json"]


class ClientSettings(BaseSettings):
    """What a client takes from the environment; an empty variable counts as not set.

    Attributes:
        redis_url: `ASYNCQ_REDIS_URL`, default `redis://localhost:6379/0`.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        str_strip_whitespace=True,
    )

    # A URL may carry a password, so it never shows up in a repr.
    redis_url: str = Field("redis://localhost:6379/0", min_length=1, repr=False)

    @classmethod
    def load(cls, flags: Mapping[str, Any] | None = None) -> Self:
        """Takes each setting from `flags`, then its `ASYNCQ_*` variable, then its default.

        Args:
            flags: Values by field name; one that is None was not given.

        Raises:
            OptionError: If a value makes no sense, or a variable looks like a misspelt one.
        """
        given = {name: value for name, value in (flags or {}).items() if value is not None}
        cls._refuse_misspelt(os.environ)
        try:
            return cls(**given)
        except ValidationError as error:
            problems = [_explain(problem, given) for problem in error.errors(include_url=False)]
            # `from None`: pydantic's own text shows the value, and a URL may carry a password.
            raise OptionError("; ".join(problems)) from None

    @classmethod
    def _refuse_misspelt(cls, variables: Iterable[str]) -> None:
        # Only a near miss is refused. Others set variables with our prefix too: for a service
        # called asyncq, Kubernetes gives each pod ASYNCQ_PORT and ASYNCQ_SERVICE_HOST.
        known = [field.upper() for field in cls.model_fields]
        for variable in variables:
            # Compared without the prefix, which would make strangers look alike.
            name = variable.removeprefix(PREFIX)
            near = get_close_matches(name, known, n=1, cutoff=0.8)
            if name != variable and near and name not in known:
                raise OptionError(
                    f"{variable} is no setting: did you mean {PREFIX}{near[0]}? Rename or unset it"
                )


class Settings(ClientSettings):
    """What the worker command takes from flags, then from the environment.

    Attributes:
        queues: `ASYNCQ_QUEUES`, as `critical=6,default=3,low`; default `default` alone.
        strict_priority: `ASYNCQ_STRICT_PRIORITY`: a queue is asked only when those of greater
            weight are empty; default false.
        concurrency: `ASYNCQ_CONCURRENCY`, how many tasks run at a time in a process; default 100.
        prefetch: `ASYNCQ_PREFETCH`, how many more it takes ahead of a free place; default 0.
        processes: `ASYNCQ_PROCESSES`, how many worker processes run; default 1.
        shutdown_timeout: `ASYNCQ_SHUTDOWN_TIMEOUT`, in seconds, what running tasks get to end
            after SIGTERM; default 8.
        log_level: `ASYNCQ_LOG_LEVEL`: debug, info, warning, error or critical; default info.
        log_format: `ASYNCQ_LOG_FORMAT`: text or json (an object a line); default text.
    """

    queues: Queues = Field(default={"default": 1}, min_length=1)
    strict_priority: bool = False
    concurrency: int = Field(default=100, ge=1)
    prefetch: int = Field(default=0, ge=0)
    processes: int = Field(default=1, ge=1)
    shutdown_timeout: float = Field(default=8.0, ge=0, allow_inf_nan=False)
    log_level: Annotated[LogLevel, BeforeValidator(_lower_case)] = "info"
    log_format: Annotated[LogFormat, BeforeValidator(_lower_case)] = "text"


def redis_url() -> str:
    """The `ASYNCQ_REDIS_URL`, or `redis://localhost:6379/0` where it is not set.

    Raises:
        OptionError: If another variable looks like it, misspelt.
    """
    return ClientSettings.load().redis_url


def _explain(problem: ErrorDetails, given: Mapping[str, object]) -> str:
    field = str(problem["loc"][0])
    name = field if field in given else f"{PREFIX}{field.upper()}"
    value = "" if field == "redis_url" else f"={problem['input']}"
    return f"{name}{value}: {problem['msg'].removeprefix('Value error, ')}"
