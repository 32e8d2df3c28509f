"""What went wrong: errors of redis-py, and what Redis answers instead of a result, as ours."""

from __future__ import annotations

from redis import exceptions

from asyncq.errors import BrokerError, BrokerFullError, BrokerUnavailableError

_TRANSIENT = ("LOADING", "BUSY ", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "READONLY", "NOREPLICAS",
              "MISCONF", "UNBLOCKED", "max number of clients")  # fmt: skip

_LOST = (exceptions.ConnectionError, exceptions.TimeoutError)


class ConnectionLostError(BrokerUnavailableError):
    """The connection died; `sent` tells whether Redis may have carried the commands out."""

    def __init__(self, cause: BaseException, where: str, *, sent: bool) -> None:
        super().__init__(f"no connection to Redis at {where}: {cause}")
        self.sent = sent


class ReadOnlyError(BrokerUnavailableError):
    """Redis is a replica now, or still."""


class NoPermissionError(BrokerError):
    """The user that we are in Redis has no right to a command."""


class NoScriptError(BrokerError):
    """Redis does not know the script: it was restarted, or its scripts were flushed."""


def translate(error: exceptions.RedisError) -> BrokerError:
    """Turn an error of redis-py into ours: full, unavailable (try later), or refused."""
    text = str(error)
    if _is_refused_login(error):
        return _refused_login(text)
    if isinstance(error, exceptions.NoPermissionError):
        return _no_permission(text)
    if isinstance(error, exceptions.ReadOnlyError):
        return _read_only(text)
    if isinstance(error, _LOST):
        return _unavailable(text)
    return refusal(text)


def is_lost(error: exceptions.RedisError) -> bool:
    """Whether nobody answered, who could have told what is wrong."""
    return (
        isinstance(error, _LOST)
        and not isinstance(error, exceptions.BusyLoadingError)
        and not _is_refused_login(error)
    )


def refusal(text: str) -> BrokerError:
    """Turn what Redis answered instead of a result into an error: full, try later, or refused."""
    code, _, rest = text.partition(" ")
    if code == "NOSCRIPT":
        return NoScriptError(text)
    if code in ("NOAUTH", "WRONGPASS"):
        return _refused_login(rest)
    if "OOM command not allowed" in text:  # inside a script it is not the first word
        return BrokerFullError(
            f"Redis is at its memory limit and takes no new tasks ({text}): let workers drain "
            "the queues, or raise maxmemory"
        )
    if code == "NOPERM":
        return _no_permission(rest)
    if "READONLY" in text:
        return _read_only(text)
    return _unavailable(text) if text.startswith(_TRANSIENT) else BrokerError(text)


def _refused_login(text: str) -> BrokerError:
    return BrokerError(f"Redis refused the credentials: {text}")


def _no_permission(text: str) -> BrokerError:
    return NoPermissionError(f"Redis does not permit the command: {text}")


def _read_only(text: str) -> BrokerError:
    return ReadOnlyError(f"Redis is a replica, which takes no writes: {text}")


def _unavailable(text: str) -> BrokerError:
    return BrokerUnavailableError(f"Redis is not available: {text}")


def _is_refused_login(error: BaseException) -> bool:
    # redis-py wraps it in a ConnectionError while it connects, and one is a ConnectionError.
    cause = error.__cause__ or error.__context__
    return isinstance(error, exceptions.AuthenticationError) or isinstance(
        cause, exceptions.AuthenticationError
    )
