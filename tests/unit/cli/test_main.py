"""The commands as a user meets them: help, wrong usage, and a store that is not there."""

from __future__ import annotations

import pytest

from tests.unit.cli.conftest import Run

NOWHERE = "redis://:secret@127.0.0.1:1"


@pytest.mark.parametrize("command", ["worker", "enqueue", "stats"])
def test_the_help_of_each_command_shows_examples_and_exit_codes(run: Run, command: str) -> None:
    ended = run(command, "--help")
    assert ended.code == 0
    assert f"asyncq {command}" in ended.out.split("Examples:")[1]
    assert "Exit codes:" in ended.out


def test_help_names_every_command_and_what_comes_from_the_environment(run: Run) -> None:
    out = run("--help").out
    assert all(f"\n  {command} " in out for command in ("worker", "enqueue", "stats"))
    assert "ASYNCQ_REDIS_URL" in out


def test_the_version_is_told(run: Run) -> None:
    assert run("--version").out.startswith("asyncq ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["worker"], "MODULE:MUX"),
        (["wrker"], "No such command"),
        (["worker", "app:mux", "--concurrency", "0"], "concurrency"),
        (["worker", "app:mux", "--processes", "0"], "processes=0"),
        (["worker", "app:mux", "--queue", "low=0"], "queue 'low' has the weight '0'"),
        (["worker", "app:mux", "--log-level", "loud"], "log_level=loud"),
        (["worker", "app:mux", "--shutdown-timeout", "soon"], "--shutdown-timeout: 'soon'"),
        (["worker", "app:mux", "--burst", "--reload"], "use one of them"),
        (["worker", "app:mux", "--loop", "trio"], "trio"),
        (["enqueue"], "TYPE"),
        (["enqueue", "t", "{user: 1}"], "is no JSON"),
        (["enqueue", "t", "[NaN]"], "JSON has no NaN"),
        (["enqueue", "t", "[" * 100_000], "nested too deeply"),
        (["enqueue", "t", "--timeout", "5x"], "--timeout: '5x' is no duration"),
        (["enqueue", "t", "--process-at", "2026-01-31T18:00"], "no time zone"),
        (["enqueue", "t", "--process-in", "1", "--process-at", "2026-01-31T18:00Z"], "not both"),
        (["enqueue", "t", "--header", "trace"], "KEY=VALUE"),
        (["enqueue", "t", "--header", "a=1", "--header", "a=2"], "given twice"),
        (["enqueue", "t", "--queue", " "], "queue name"),
        (["enqueue", "t", "--wait=5x"], "--wait: '5x' is no duration"),
        (["stats", "--redis", "mysql://x"], "unknown scheme"),
        (["stats", "--interval", "often"], "--interval: 'often'"),
    ],
)
def test_wrong_usage_is_told_on_stderr_with_exit_code_2(
    run: Run, arguments: list[str], message: str
) -> None:
    ended = run(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("arguments", [["stats"], ["stats", "--watch"], ["enqueue", "t", "1"]])
def test_no_redis_is_told_on_stderr_with_exit_code_1_and_without_the_password(
    run: Run, arguments: list[str]
) -> None:
    ended = run(*arguments, "--redis", NOWHERE)
    assert (ended.code, ended.out) == (1, "")
    assert "no connection to Redis at redis://:***@127.0.0.1:1" in ended.err
    assert "secret" not in ended.err
    assert "Traceback" not in ended.err


def test_a_misspelt_variable_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCQ_REDIS_URI", NOWHERE)
    ended = run("stats")
    assert ended.code == 2
    assert "did you mean ASYNCQ_REDIS_URL?" in ended.err
    assert "secret" not in ended.err
