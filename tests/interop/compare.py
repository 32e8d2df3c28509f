"""Compares what a thousand tasks should be with what they are, and says where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SHOWN = 20


@dataclass(frozen=True)
class Between:
    """Stands for every number, or every datetime, from `low` to `high`."""

    low: Any
    high: Any


def assert_same(expected: Mapping[str, Mapping[str, object]], found: Mapping[str, object]) -> None:
    """Assert that `found` has these ids and no others, each with these attributes."""
    lines = [f"{id}: missing" for id in expected if id not in found]
    lines += [f"{id}: not expected: {found[id]}" for id in found if id not in expected]
    for id, attributes in expected.items():
        if id in found:
            lines += [
                f"{id}: {name} is {is_!r}, should be {should!r}"
                for name, should in attributes.items()
                if not _fits(should, is_ := getattr(found[id], name))
            ]
    more = f"\n... and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    assert not lines, f"{len(lines)} differences:\n" + "\n".join(lines[:SHOWN]) + more


def _fits(should: object, is_: Any) -> bool:
    if isinstance(should, Between):
        return is_ is not None and bool(should.low <= is_ <= should.high)
    return bool(should == is_)
