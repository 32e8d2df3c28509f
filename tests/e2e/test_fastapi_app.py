from __future__ import annotations

import csv
import hashlib
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.program import program, served
from tests.stores import Stores, StoreServer

APP = "examples.fastapi_app.app:app"
JOBS = "examples.fastapi_app.jobs:mux"
WITHIN_S = 30.0


@pytest.fixture(scope="module")
def http(stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The app, with a worker behind it."""
    url, folder = stores.fresh().url, tmp_path_factory.mktemp("fastapi")
    worker = ["-m", "asyncq", "worker", JOBS, "--queue", "default=3", "--queue", "low=1"]
    with (
        program(worker, folder / "worker.log", env={"ASYNCQ_REDIS_URL": url}),
        served(APP, url, folder) as http,
    ):
        yield http


def start(http: httpx.Client, **export: Any) -> str:
    answer = http.post("/exports", json=export)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def until(http: httpx.Client, id: str, condition: Callable[[dict[str, Any]], bool]) -> Any:
    """Ask for the status until it is as wanted."""
    deadline = time.monotonic() + WITHIN_S
    while not condition(status := http.get(f"/exports/{id}").json()):
        assert time.monotonic() < deadline, status
    return status


def test_a_route_enqueues_and_another_gives_the_result(http: httpx.Client) -> None:
    id = start(http, customer=7, rows=3, seconds_a_row=0)
    answer = http.get(f"/exports/{id}/result", params={"wait": 30})
    file = io.StringIO()
    csv.writer(file).writerows([[7, 0], [7, 1], [7, 2]])
    data = file.getvalue().encode()
    assert answer.status_code == 200
    assert answer.json() == {
        "rows": 3,
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    assert http.get(f"/exports/{id}").json() == {
        "state": "completed",
        "progress": 1.0,
        "note": "row 3 of 3",
        "failures": 0,
        "error": "",
    }


def test_a_running_export_shows_its_progress_and_is_cancelled(http: httpx.Client) -> None:
    id = start(http, customer=7, rows=100_000, seconds_a_row=0.01)
    status = until(http, id, lambda status: status["progress"] > 0)
    assert status["state"] == "active"
    assert http.get(f"/exports/{id}/result", params={"wait": 0.01}).status_code == 202

    assert http.delete(f"/exports/{id}").status_code == 202
    answer = http.get(f"/exports/{id}/result", params={"wait": 30})
    assert answer.status_code == 409
    assert answer.json() == {"detail": "the export failed: context canceled"}
    assert http.get(f"/exports/{id}").json()["state"] == "archived"
    assert http.delete(f"/exports/{id}").status_code == 409


def test_somebody_signs_up_once(http: httpx.Client) -> None:
    first = http.post("/signups", json={"email": "ada@mail.example"})
    again = http.post("/signups", json={"email": "ada@mail.example"})
    other = http.post("/signups", json={"email": "alan@mail.example"})
    assert (first.status_code, again.status_code, other.status_code) == (202, 409, 202)
    assert first.json()["id"] in again.json()["detail"]


def test_what_is_not_there_and_what_makes_no_sense(http: httpx.Client) -> None:
    for method, path in [
        ("GET", "/exports/nobody"),
        ("GET", "/exports/nobody/result"),
        ("DELETE", "/exports/nobody"),
    ]:
        assert http.request(method, path).status_code == 404
    assert http.post("/exports", json={"customer": 7, "rows": 0}).status_code == 422


def test_while_redis_is_away_the_app_says_so_and_goes_on_by_itself(
    redis_server: Callable[..., StoreServer], tmp_path: Path
) -> None:
    store = redis_server()
    with served(APP, store.url, tmp_path) as http:
        id = start(http, customer=7, rows=1)
        store.kill()
        answer = http.post("/exports", json={"customer": 7, "rows": 1})
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "5"
        assert http.get(f"/exports/{id}").status_code == 503
        store.start()
        start(http, customer=7, rows=1)
