"""The `ASYNCQ_*` variables: what they mean, and what a mistake in them says."""

from __future__ import annotations

import os

import pytest

from asyncq.errors import OptionError
from asyncq.settings import ClientSettings, Settings, parse_queues, redis_url


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("ASYNCQ_"):
            monkeypatch.delenv(variable)


def test_without_variables_the_documented_defaults_hold() -> None:
    settings = Settings.load()
    assert redis_url() == settings.redis_url == "redis://localhost:6379/0"
    assert settings.queues == {"default": 1}
    assert (settings.concurrency, settings.processes) == (100, 1)
    assert settings.shutdown_timeout == 8
    assert settings.strict_priority is False
    assert (settings.log_level, settings.log_format) == ("info", "text")


def test_each_variable_sets_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCQ_REDIS_URL", " unix:///run/redis.sock ")
    monkeypatch.setenv("ASYNCQ_QUEUES", "critical=6, default=3,low")
    monkeypatch.setenv("ASYNCQ_STRICT_PRIORITY", "true")
    monkeypatch.setenv("ASYNCQ_CONCURRENCY", "10")
    monkeypatch.setenv("ASYNCQ_PREFETCH", "20")
    monkeypatch.setenv("ASYNCQ_PROCESSES", "4")
    monkeypatch.setenv("ASYNCQ_SHUTDOWN_TIMEOUT", "2.5")
    monkeypatch.setenv("ASYNCQ_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("ASYNCQ_LOG_FORMAT", "json")
    assert Settings.load().model_dump() == {
        "redis_url": "unix:///run/redis.sock",
        "queues": {"critical": 6, "default": 3, "low": 1},
        "strict_priority": True,
        "concurrency": 10,
        "prefetch": 20,
        "processes": 4,
        "shutdown_timeout": 2.5,
        "log_level": "debug",
        "log_format": "json",
    }


def test_a_flag_wins_over_its_variable_and_one_not_given_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ASYNCQ_CONCURRENCY", "10")
    monkeypatch.setenv("ASYNCQ_LOG_LEVEL", "error")
    settings = Settings.load({"concurrency": 20, "log_level": None})
    assert (settings.concurrency, settings.log_level) == (20, "error")


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCQ_REDIS_URL", "")
    assert redis_url() == "redis://localhost:6379/0"


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("ASYNCQ_CONCURRENCY", "ten", "valid integer"),
        ("ASYNCQ_CONCURRENCY", "0", "greater than or equal to 1"),
        ("ASYNCQ_PROCESSES", "auto", "valid integer"),
        ("ASYNCQ_PROCESSES", "0", "greater than or equal to 1"),
        ("ASYNCQ_SHUTDOWN_TIMEOUT", "-1", "greater than or equal to 0"),
        ("ASYNCQ_SHUTDOWN_TIMEOUT", "nan", "finite number"),
        ("ASYNCQ_STRICT_PRIORITY", "maybe", "valid boolean"),
        ("ASYNCQ_LOG_LEVEL", "loud", "'debug', 'info', 'warning', 'error' or 'critical'"),
        ("ASYNCQ_LOG_FORMAT", "yaml", "'text' or 'json'"),
        ("ASYNCQ_QUEUES", "critical=much", "a weight is a whole number from 1 up"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(OptionError) as caught:
        Settings.load()
    assert str(caught.value).startswith(f"{variable}={value}: ")
    assert reason in str(caught.value)


def test_all_bad_values_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCQ_CONCURRENCY", "ten")
    monkeypatch.setenv("ASYNCQ_LOG_FORMAT", "yaml")
    with pytest.raises(OptionError, match=r"ASYNCQ_CONCURRENCY=ten.*; ASYNCQ_LOG_FORMAT=yaml"):
        Settings.load()


def test_a_bad_flag_is_not_blamed_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCQ_CONCURRENCY", "10")
    with pytest.raises(OptionError, match=r"^concurrency=0: "):
        Settings.load({"concurrency": 0})


def test_an_unknown_flag_is_refused() -> None:
    with pytest.raises(OptionError, match="concurency"):
        Settings.load({"concurency": 3})


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("ASYNCQ_CONCURENCY", "ASYNCQ_CONCURRENCY"),
        ("ASYNCQ_QUEUE", "ASYNCQ_QUEUES"),
        ("ASYNCQ_REDIS_URI", "ASYNCQ_REDIS_URL"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_right_spelling(
    monkeypatch: pytest.MonkeyPatch, variable: str, meant: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(OptionError, match=f"{variable} is no setting: did you mean {meant}"):
        Settings.load()


@pytest.mark.parametrize(
    "variable",
    [
        "ASYNCQ_PORT",
        "ASYNCQ_SERVICE_HOST",
        "ASYNCQ_REDIS_PORT",
        "ASYNCQ_REDIS_SERVICE_HOST",
        "ASYNCQ_REDIS_PORT_6379_TCP",
    ],
)
def test_a_variable_that_kubernetes_sets_for_a_service_is_let_be(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "tcp://10.0.0.1:6379")
    Settings.load()


def test_a_client_does_not_fail_for_what_only_a_worker_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ASYNCQ_CONCURRENCY", "ten")
    monkeypatch.setenv("ASYNCQ_LOGLEVEL", "info")
    assert redis_url() == "redis://localhost:6379/0"


def test_the_password_of_a_url_shows_neither_in_the_repr_nor_in_an_error() -> None:
    settings = ClientSettings.load({"redis_url": "redis://:secret@host/0"})
    assert "secret" not in repr(settings)
    with pytest.raises(OptionError, match=r"^redis_url: ") as caught:
        ClientSettings.load({"redis_url": ["redis://:secret@host/0"]})
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        (["=3"], "names no queue"),
        (["a", " "], "names no queue"),
        (["a=1", "a=2"], "named twice"),
        (["a=0"], "weight '0'"),
        (["a=1.5"], "weight '1.5'"),
        (["a="], "weight ''"),
        (["a=²"], "weight '²'"),
    ],
)
def test_queues_that_make_no_sense_are_refused(pairs: list[str], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        parse_queues(pairs)
