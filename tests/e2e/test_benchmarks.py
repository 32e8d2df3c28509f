from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import load, report
from benchmarks.claims import Claim, against, against_best, any_peer
from benchmarks.ledger import Ledger
from benchmarks.measured import Results
from benchmarks.peers import ADAPTERS
from benchmarks.programs import MeasurementError
from benchmarks.systems import ASYNQ, OURS, SAQ, SYSTEMS
from benchmarks.workloads import WORKLOADS, Bench, Workload
from tests.e2e.program import ROOT, environment

END_WITHIN_S = 60.0


def benchmarks(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.load", *arguments],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


# A run


def test_a_quick_run_measures_and_writes_plausible_numbers(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    # Tasks that wait: a drain of so few may be over at the first look, and then has no cost.
    run = benchmarks(
        "--quick", "--tasks", "0.5", "--systems", "ours", "--only", "sleep-100", "pickup",
        "--json", str(file),
    )  # fmt: skip
    output, _ = run.communicate(timeout=END_WITHIN_S)
    assert run.returncode == 0, output

    drain, pickup = json.loads(file.read_text())["measurements"]
    assert (drain["workload"], drain["system"]) == ("sleep-100", "ours")
    assert drain["numbers"]["tasks"] == 5_000
    assert 100 < drain["numbers"]["rate"] < 1e6
    assert 0 < drain["numbers"]["redis_cpu_us"] < 1e4
    assert pickup["workload"] == "pickup"
    assert 0 < pickup["numbers"]["p50_ms"] <= pickup["numbers"]["p99_ms"] < 10_000
    for numbers in (drain["numbers"], pickup["numbers"]):
        assert (numbers["once"], numbers["acked"], numbers["clean"]) == (1, 1, 1)
    assert "Drain, 10 ms of waiting a task" in output
    assert "What it must show" in output


def test_ctrl_c_prints_what_there_is_and_leaves_no_process(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    run = benchmarks(
        "--quick", "--systems", "ours", "--only", "enqueue-50", "pickup", "--rounds", "50",
        "--json", str(file),
    )  # fmt: skip
    try:
        assert run.stdout is not None
        for line in run.stdout:
            if "enqueue-50 " in line:
                break
        family = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGINT)
        output, _ = run.communicate(timeout=END_WITHIN_S)
    finally:
        run.kill()
    assert run.returncode == 128 + signal.SIGINT, output
    assert "Stopped by Ctrl-C" in output
    assert "Traceback" not in output
    assert "Enqueue, 50 in flight" in output
    assert json.loads(file.read_text())["measurements"][0]["workload"] == "enqueue-50"
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []


def no_bench() -> Any:
    return nullcontext()


class Interrupted:
    """Is hit by Ctrl-C while it is being finalized."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_heard_even_inside_a_finalizer() -> None:
    def measure(bench: Bench, system: object) -> dict[str, float]:
        Interrupted()
        time.sleep(END_WITHIN_S)  # is cut short
        raise AssertionError

    turn = load.Turn(1, Workload("drain-100", "Drain", measure), OURS)
    assert load._measure(no_bench, [turn], [])


def test_a_measurement_that_fails_is_noted_with_its_reason() -> None:
    def broken(bench: Bench, system: object) -> dict[str, float]:
        raise MeasurementError("the worker took no task")

    turn = load.Turn(2, Workload("drain-100", "Drain", broken), OURS)
    entry = load._measured(no_bench, turn)
    assert entry["error"] == "the worker took no task"
    table = report.tables(data(entry))[0]
    assert table.notes == ["asyncq failed in 1 of 1 rounds: the worker took no task"]


def test_every_round_begins_with_another_system() -> None:
    turns = load.plan(3, ["drain-10"], [OURS, ASYNQ, SAQ])
    assert [turn.system.name for turn in turns] == [
        *("ours", "asynq", "saq"),
        *("asynq", "saq", "ours"),
        *("saq", "ours", "asynq"),
    ]


# The ledger


def test_the_ledger_tells_what_ran_twice_and_what_did_not_run(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger", 4)
    assert [ledger.ran(i) for i in (0, 1, 1)] == [1, 1, 2]
    ledger.started(2)
    assert ledger.wrong() == [1, 2, 3]  # twice, not ended, never
    assert ledger.done() == 2
    ledger.ended(2)
    assert ledger.wrong() == [1, 3]
    assert ledger.wrong(runs=2) == [0, 2, 3]
    ledger.clear()
    assert ledger.done() == 0
    ledger.close()


def test_the_ledger_is_shared_with_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger.create(tmp_path / "ledger", 3)
    monkeypatch.setenv("BENCH_LEDGER", str(ledger.path))
    code = (
        "from benchmarks.ledger import Ledger; ledger = Ledger.from_environment();"
        "ledger.sent(1, 7); ledger.ran(1)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    row = ledger.row(1)
    assert (row.sent_ns, row.runs) == (7, 1)
    assert row.started_ns == row.ended_ns > 0
    assert ledger.wrong() == [0, 2]
    ledger.close()


# What comes of it


def data(*measurements: dict[str, Any], systems: tuple[str, ...] = ("ours",)) -> dict[str, Any]:
    return {"systems": dict.fromkeys(systems, "1.0"), "measurements": list(measurements)}


def rates(workload: str, system: str, *values: float) -> list[dict[str, Any]]:
    return [
        {"round": i, "workload": workload, "system": system, "numbers": {"rate": value}}
        for i, value in enumerate(values, 1)
    ]


def test_a_claim_is_judged_by_the_median_of_the_ratios_of_each_round() -> None:
    results = Results(
        data(*rates("drain-100", "ours", 30, 80, 10), *rates("drain-100", "asynq", 10, 20, 5))
    )
    value = against("drain-100", ASYNQ)(results)
    assert value is not None
    assert (value.least, value.median, value.most) == (2, 3, 4)
    assert Claim("three times", against("drain-100", ASYNQ), at_least=3).met(value)
    assert not Claim("more", against("drain-100", ASYNQ), at_least=3.1).met(value)
    assert not Claim("less", against("drain-100", ASYNQ), at_most=2.9).met(value)


def test_the_best_peer_is_the_one_with_the_best_median() -> None:
    results = Results(
        data(
            *rates("drain-100", "ours", 60, 60, 60),
            *rates("drain-100", "asynq", 10, 20, 100),
            *rates("drain-100", "saq", 30, 30, 30),
        )
    )
    value = against_best("drain-100", any_peer)(results)
    assert value is not None
    assert value.median == 2


def test_a_claim_that_was_not_measured_is_not_shown() -> None:
    assert report.claims_table(Results(data())).rows == []


def test_what_a_failed_measurement_says_cannot_break_the_docs() -> None:
    entry = {"round": 1, "workload": "drain-10", "system": "ours", "error": "<b>|\n[x](y) `z`"}
    text = report.tables(data(entry))[0].markdown()
    assert r"\<b\>\| \[x\](y)" in text


def test_the_docs_show_the_results_that_are_committed() -> None:
    if not load.RESULTS.exists():
        pytest.skip("there are no results of a whole run yet")
    results = json.loads(load.RESULTS.read_text("utf-8"))
    text = report.DOCS.read_text("utf-8")
    assert text == report.documented(text, results)
    assert all(
        (report.DOCS.parent / plot).exists() for plot in re.findall(r"\((benchmarks/\S+svg)", text)
    )


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name not in ("ours", "asynq")])
def test_every_peer_is_described_and_pinned(name: str) -> None:
    system = SYSTEMS[name]
    assert system.acknowledging
    assert system.lacks <= {*WORKLOADS, "bulk", "scheduled", "retries", "sequential", "concurrent"}
    pins = (ADAPTERS / "requirements" / f"{name}.txt").read_text().splitlines()
    assert pins
    assert [pin for pin in pins if pin and not pin.startswith("#") and "==" not in pin] == []
