"""`worker app:mux`: the object is found, and each way of not finding it reads differently."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from asyncq.cli.importer import (
    AttributeMissingError,
    ImportFromStringError,
    ModuleFailedError,
    ModuleMissingError,
    load,
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for modules; what is imported from it is forgotten afterwards."""
    path, modules = sys.path.copy(), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(folder: Path, name: str, source: str) -> None:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(dedent(source))


def test_the_named_object_is_returned(folder: Path) -> None:
    write(folder, "shop.py", "mux = object()")
    assert load("shop:mux", directory=folder) is sys.modules["shop"].mux


def test_an_attribute_of_an_object_in_a_package_is_found(folder: Path) -> None:
    write(folder, "shop/__init__.py", "")
    write(folder, "shop/tasks.py", "class Mail:\n    mux = 'mail'")
    assert load("shop.tasks:Mail.mux", directory=folder) == "mail"


def test_the_directory_comes_first_on_the_path_and_stays_for_later_imports(folder: Path) -> None:
    write(folder, "shop.py", "mux = 1")
    load("shop:mux", directory=folder)
    load("shop:mux", directory=folder)
    assert sys.path[0] == str(folder)
    assert sys.path.count(str(folder)) == 1


def test_without_a_directory_the_path_is_left_as_it_is() -> None:
    before = sys.path.copy()
    load("pathlib:Path")
    assert sys.path == before


def test_a_missing_module_is_told_as_missing(folder: Path) -> None:
    with pytest.raises(ModuleMissingError, match="no module 'shop': start in the folder") as caught:
        load("shop:mux", directory=folder)
    assert caught.value.module == "shop"


def test_a_module_missing_from_its_package_is_told_with_the_package(folder: Path) -> None:
    write(folder, "shop/__init__.py", "")
    with pytest.raises(
        ModuleMissingError, match=r"'shop\.tasks': package 'shop' was found, but 'tasks'"
    ):
        load("shop.tasks:mux", directory=folder)


def test_a_missing_attribute_is_told_with_one_of_a_similar_name(folder: Path) -> None:
    write(folder, "shop.py", "mux = 1")
    with pytest.raises(
        AttributeMissingError,
        match=r"module 'shop' was imported, but has no attribute 'mx': did you mean 'mux'\?",
    ):
        load("shop:mx", directory=folder)


def test_a_missing_nested_attribute_is_told_with_the_whole_name(folder: Path) -> None:
    write(folder, "shop.py", "class Mail: pass")
    with pytest.raises(AttributeMissingError, match=r"no attribute 'mux' \(in 'Mail\.mux'\)"):
        load("shop:Mail.mux", directory=folder)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import no_such_library", r"ModuleNotFoundError: No module named 'no_such_library'"),
        ("from pathlib import Paht", r"ImportError: cannot import name 'Paht'"),
        ("1 / 0", r"ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", r"SystemExit: 3"),
        ("import shop.tasks", r"ModuleNotFoundError: No module named 'shop.tasks'"),
    ],
)
def test_an_error_inside_the_module_is_told_as_such_with_its_line(
    folder: Path, source: str, told: str
) -> None:
    write(folder, "shop.py", f"mux = 1\n{source}\n")
    message = f"module 'shop' was found, but failed while it was imported: {told}"
    with pytest.raises(ModuleFailedError, match=message) as caught:
        load("shop:mux", directory=folder)
    assert str(caught.value).endswith(f"({folder / 'shop.py'}, line 2)")
    assert caught.value.__cause__ is not None


def test_an_error_below_the_module_is_told_with_the_line_in_the_users_code(folder: Path) -> None:
    write(folder, "shop.py", "import tasks")
    write(folder, "tasks.py", "import json\n\njson.loads('{')")
    with pytest.raises(ModuleFailedError) as caught:
        load("shop:mux", directory=folder)
    assert str(caught.value).endswith(f"({folder / 'tasks.py'}, line 3)")


def test_a_syntax_error_is_told_with_its_line_once(folder: Path) -> None:
    write(folder, "shop.py", "mux = 1\nmux = = 2")
    with pytest.raises(ModuleFailedError, match=r"SyntaxError: .*\(shop\.py, line 2\)$"):
        load("shop:mux", directory=folder)


@pytest.mark.parametrize(
    ("target", "meant"),
    [
        ("app", "app:mux"),
        ("app.py", "app:mux"),
        ("src/app.py", "src.app:mux"),
        ("./app.py:tasks", "app:tasks"),
        ("shop.tasks:", "shop.tasks:mux"),
        (":mux", "app:mux"),
        ("", "app:mux"),
        (".app:mux", "app:mux"),
        ("app:mux()", "app:mux"),
    ],
)
def test_another_form_is_refused_with_what_may_be_meant(target: str, meant: str) -> None:
    with pytest.raises(ImportFromStringError, match=f"did you mean {meant!r}") as caught:
        load(target)
    assert type(caught.value) is ImportFromStringError
