"""Reads what a run measured: numbers by workload, system and round, and ratios of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

ByRound = dict[int, float]


class Results:
    """What a run measured, as load.py writes it."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.systems: dict[str, str] = data["systems"]
        """Versions by name."""
        self._numbers: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
        self._errors: dict[tuple[str, str], list[str]] = {}
        for entry in data["measurements"]:
            key = entry["workload"], entry["system"]
            if "error" in entry:
                self._errors.setdefault(key, []).append(entry["error"])
            else:
                self._numbers.setdefault(key, {})[entry["round"]] = entry["numbers"]

    def values(self, workload: str, system: str, name: str) -> ByRound:
        """Return one number by round; empty where it was not measured."""
        rounds = self._numbers.get((workload, system), {})
        return {i: numbers[name] for i, numbers in rounds.items() if name in numbers}

    def spread(self, workload: str, system: str, name: str) -> Spread | None:
        """Sum up one number over the rounds; None where it was not measured."""
        return Spread.of(self.values(workload, system, name).values())

    def errors(self, workload: str, system: str) -> list[str]:
        """Return why measurements failed."""
        return self._errors.get((workload, system), [])

    def took_part(self, workload: str) -> list[str]:
        """Return the systems that were measured, those that failed among them."""
        tried = self._numbers.keys() | self._errors.keys()
        return [name for name in self.systems if (workload, name) in tried]

    def rounds(self, workload: str, system: str) -> int:
        """Count the measurements that have numbers."""
        return len(self._numbers.get((workload, system), {}))


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of the rounds, the least, and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Sum up values; None if there are none."""
        ordered = sorted(values)
        return cls(median(ordered), ordered[0], ordered[-1]) if ordered else None


def ratio(above: ByRound, below: ByRound) -> Spread | None:
    """Divide round by round, so that what else the machine did in a round meets both."""
    return Spread.of(above[i] / below[i] for i in above if below.get(i))
