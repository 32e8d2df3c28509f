"""Which asyncq runs here."""

from __future__ import annotations

from importlib import metadata

__all__ = ["version"]


def version() -> str:
    """Return the version of asyncq that is installed."""
    try:
        return metadata.version("asyncq")
    except metadata.PackageNotFoundError:
        return "(a checkout that is not installed)"
