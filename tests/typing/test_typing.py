"""The public interface as type checkers see it: what they accept, and what they must reject.

The files good_*.py are free of errors. In bad_*.py the lines marked `# E` are errors, and no
others, for each checker.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
GOOD = sorted(HERE.glob("good_*.py"))
BAD = sorted(HERE.glob("bad_*.py"))

Place = tuple[str, int]  # file, line


def marked() -> set[Place]:
    """Every place where an error belongs."""
    return {
        (file.name, number)
        for file in (*GOOD, *BAD)
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if line.endswith("# E")
    }


def run(*command: str) -> str:
    """Run a checker, which may find errors but must not fail; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr or done.stdout
    return done.stdout


def mypy() -> dict[Place, str]:
    files = [str(file.relative_to(ROOT)) for file in (*GOOD, *BAD)]
    # Errors inside the library itself are for `make check` to find.
    output = run("mypy", "--strict", "--follow-imports=silent", *files)
    found: dict[Place, str] = {}
    for line in output.splitlines():
        if match := re.match(r"(.+\.py):(\d+): error: (.+)", line):
            path, number, message = match.groups()
            found.setdefault((Path(path).name, int(number)), message)
    return found


def pyright() -> dict[Place, str]:
    output = run("pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(HERE))
    return {
        (Path(one["file"]).name, one["range"]["start"]["line"] + 1): one["message"]
        for one in json.loads(output)["generalDiagnostics"]
        if one["severity"] == "error"
    }


def test_there_is_something_to_check() -> None:
    assert len(GOOD) >= 3
    assert {name for name, _ in marked()} == {file.name for file in BAD}


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_a_checker_accepts_what_is_right_and_rejects_what_is_wrong(
    checker: Callable[[], dict[Place, str]],
) -> None:
    found = checker()
    unexpected = {place: found[place] for place in found.keys() - marked()}
    missed = marked() - found.keys()
    assert (unexpected, missed) == ({}, set())


@pytest.mark.parametrize("file", GOOD, ids=lambda file: file.stem)
def test_what_type_checks_can_also_be_imported(file: Path) -> None:
    assert importlib.import_module(f"tests.typing.{file.stem}")
