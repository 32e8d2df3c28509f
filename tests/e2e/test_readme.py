"""The README is code: what it shows is run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.program import ROOT, environment, program, served

README = (ROOT / "README.md").read_text()

pytestmark = pytest.mark.docs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the README's Python files, each named by its first line."""
    for block in blocks("python"):
        name, newline, code = block.partition("\n")
        (tmp_path / name.removeprefix("# ")).write_text(newline + code)
    return tmp_path


@pytest.fixture
def worker(folder: Path, store_url: str) -> Iterator[None]:
    """The worker that the README runs."""
    (arguments,) = re.findall(r"^\$ python (-m asyncq worker tasks:mux) &$", README, re.M)
    with program(
        arguments.split(), folder / "worker.log", cwd=folder, env={"ASYNCQ_REDIS_URL": store_url}
    ):
        yield


def blocks(language: str) -> list[str]:
    """The README's blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def python(*arguments: str, cwd: Path, **env: str) -> str:
    """Run Python to its end, and return what it wrote."""
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.usefixtures("worker")
def test_the_quickstart_prints_what_the_readme_shows(folder: Path, store_url: str) -> None:
    (shown,) = re.findall(r"^\$ python send\.py\n(.*?)^\$", README, re.M | re.S)
    assert python("send.py", cwd=folder, ASYNCQ_REDIS_URL=store_url) == shown


@pytest.mark.usefixtures("worker")
def test_the_fastapi_app_answers(folder: Path, store_url: str) -> None:
    with served("api:app", store_url, folder) as http:
        id = http.post("/signups", json={"user_id": 1}).json()
        answer = http.get(f"/signups/{id}")
    assert (answer.status_code, answer.json()) == (httpx.codes.OK, "sent to 1, try 2")


def test_the_unit_test_passes(folder: Path) -> None:
    assert "1 passed" in python("-m", "pytest", "-q", "-p", "no:asyncio", cwd=folder)


def test_the_commands_are_there() -> None:
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake (\w+)", README):
        assert re.search(rf"^{target}:", targets, re.M), target
