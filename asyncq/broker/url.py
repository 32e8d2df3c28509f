"""What a Redis URL means."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import redis.asyncio as aioredis
from redis.asyncio.connection import parse_url

from asyncq.errors import OptionError

_URL_OPTIONS = {
    "client_name", "connection_class", "db", "host", "password", "path", "port", "username",
}  # fmt: skip


def parsed(url: str) -> tuple[dict[str, Any], str | None]:
    """Return what redis-py's connection takes, and the path of the embedded store, if it is one.

    Raises:
        OptionError: the URL makes no sense.
    """
    try:
        match urlsplit(url).scheme:
            case "embedded":
                path, _, query = url.removeprefix("embedded://").partition("?")
                kwargs = {"connection_class": aioredis.UnixDomainSocketConnection, "db": _db(query)}
                return kwargs, unquote(path)
            case "redis-socket":  # Asynq's name for unix://
                return _connection_options(_unix_url(url)), None
            case "redis" | "rediss" | "unix":
                return _connection_options(url), None
            case _:
                pass
    except (ValueError, TypeError) as error:
        raise OptionError(f"the Redis URL {without_password(url)!r} is wrong: {error}") from None
    raise OptionError(
        f"the Redis URL {without_password(url)!r} has an unknown scheme: use redis://, rediss://, "
        "unix://, redis-socket:// or embedded://"
    )


def without_password(url: str) -> str:
    """Return a URL as it may be shown."""
    masked = re.sub(r"(://[^/@]*?):.*@", r"\1:***@", url)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", masked)


def _connection_options(url: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(parse_url(url))
    for name in options:
        if name not in _URL_OPTIONS and not name.startswith("ssl_"):
            raise ValueError(f"there is no option {name!r}, only db, client_name and ssl_...")
    return options


def _unix_url(url: str) -> str:
    return "unix://" + url.removeprefix("redis-socket://")


def _db(query: str) -> int:
    return int(parse_qs(query).get("db", ["0"])[0])
