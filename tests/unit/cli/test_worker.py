"""What a worker says when it starts, and whether it has a Mux to run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncq import OptionError
from asyncq.cli import worker
from asyncq.cli.importer import ImportFromStringError
from asyncq.cli.worker import LoopKind, load_mux, loop_factory, without_password


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for modules; what is imported from it is forgotten afterwards."""
    path, modules = sys.path.copy(), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_another_object_is_told_from_a_mux_with_what_may_have_been_meant(folder: Path) -> None:
    (folder / "shop_of_this_test.py").write_text("from asyncq import Mux\njobs = Mux()\napp = 1")
    assert load_mux("shop_of_this_test:jobs", folder).types == {}
    with pytest.raises(ImportFromStringError, match=r"is a int and no Mux: did you mean .*:jobs"):
        load_mux("shop_of_this_test:app", folder)


def test_without_any_mux_in_the_module_the_message_says_what_one_is(folder: Path) -> None:
    (folder / "empty_of_this_test.py").write_text("app = 1")
    with pytest.raises(ImportFromStringError, match="handlers are registered on"):
        load_mux("empty_of_this_test:app", folder)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://:secret@host/0", "redis://:***@host/0"),
        ("rediss://user:se/cr@et@host", "rediss://user:***@host"),
        ("unix://user:secret@/run/s?db=1", "unix://user:***@/run/s?db=1"),
        ("redis://host?password=secret&db=1", "redis://host?password=***&db=1"),
        ("embedded:///tmp/a:b@c", "embedded:///tmp/a:b@c"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_uvloop_is_taken_where_it_is_installed_and_asked_for_by_name_where_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert loop_factory(LoopKind.ASYNCIO) is None
    monkeypatch.setattr(worker, "find_spec", lambda name: None)
    assert loop_factory(LoopKind.AUTO) is None
    with pytest.raises(OptionError, match=r"pip install 'asyncq\[uvloop\]'"):
        loop_factory(LoopKind.UVLOOP)
