"""What the values of options mean: durations, instants, and a `--wait` that may stand alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from asyncq import OptionError
from asyncq.cli.enqueue import complete_wait
from asyncq.cli.options import duration, instant


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("0", 0),
        ("1.5", 1.5),
        ("1.5s", 1.5),
        ("250ms", 0.25),
        ("10m", 600),
        ("2h", 7200),
        ("1d", 86400),
        ("1h30m", 5400),
    ],
)
def test_a_duration_is_read_in_seconds(text: str, seconds: float) -> None:
    assert duration(text, "--timeout") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "-1", "5x", "s", "1h30", "1 h", "nan", "1e3", "٣s", "5\n"])
def test_what_is_no_duration_is_refused_with_the_option_and_a_hint(text: str) -> None:
    with pytest.raises(OptionError, match=r"--timeout: .* is no duration: write 90, 1\.5s, 10m"):
        duration(text, "--timeout")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-31T18:00Z", datetime(2026, 1, 31, 18, tzinfo=UTC)),
        ("2026-01-31 18:00:05+01:00", datetime(2026, 1, 31, 18, 0, 5,
                                               tzinfo=timezone(timedelta(hours=1)))),
    ],
)  # fmt: skip
def test_an_instant_is_read_with_its_time_zone(text: str, expected: datetime) -> None:
    found = instant(text, "--deadline")
    assert found == expected
    assert found is not None
    assert found.utcoffset() == expected.utcoffset()


def test_an_instant_without_a_time_zone_is_refused() -> None:
    with pytest.raises(OptionError, match=r"--deadline: .* has no time zone: add Z for UTC"):
        instant("2026-01-31T18:00", "--deadline")


def test_what_is_no_instant_is_refused() -> None:
    with pytest.raises(OptionError, match="--deadline: 'tomorrow' is no instant"):
        instant("tomorrow", "--deadline")


def test_what_is_not_given_stays_so() -> None:
    assert duration(None, "--timeout") is None
    assert instant(None, "--deadline") is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["t", "--wait"], ["t", "--wait=forever"]),
        (["--wait", "t"], ["--wait=forever", "t"]),
        (["t", "--wait", "--json"], ["t", "--wait=forever", "--json"]),
        (["t", "--wait", "5"], ["t", "--wait", "5"]),
        (["t", "--wait", "1m30s", "{}"], ["t", "--wait", "1m30s", "{}"]),
        (["t", "--wait=5"], ["t", "--wait=5"]),
        (["--raw", "--", "t", "--wait"], ["--raw", "--", "t", "--wait"]),
    ],
)
def test_a_wait_without_a_duration_gets_a_value(given: list[str], expected: list[str]) -> None:
    assert complete_wait(given) == expected
