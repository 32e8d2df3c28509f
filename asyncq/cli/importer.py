"""Finds the object that `worker app:mux` names, and tells apart what can go wrong on the way."""

from __future__ import annotations

import importlib
import sys
import sysconfig
import traceback
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from asyncq import AsyncqError

__all__ = [
    "AttributeMissingError",
    "ImportFromStringError",
    "ModuleFailedError",
    "ModuleMissingError",
    "load",
    "traceback_of",
]

# Also "<": the frames of Python's own import system are of the file "<frozen importlib...>".
_NOT_THE_USERS = ("<", __file__, *(sysconfig.get_path(k) for k in ("stdlib", "purelib", "platlib")))
_IMPORTING = ("<frozen importlib", __file__, importlib.__file__)


class ImportFromStringError(AsyncqError):
    """A target is not of the form MODULE:ATTRIBUTE, or the object it names cannot be had."""


class ModuleMissingError(ImportFromStringError):
    """There is no module of this name."""

    def __init__(self, module: str, missing: str) -> None:
        package, _, name = missing.rpartition(".")
        hint = (
            f"package {package!r} was found, but {name!r} is not in it"
            if package
            else f"start in the folder that holds {name!r}, or install its package"
        )
        super().__init__(f"there is no module {module!r}: {hint}")
        self.module = module


class ModuleFailedError(ImportFromStringError):
    """The module exists, but raised an error while it was imported; the error is `__cause__`."""

    def __init__(self, module: str, error: BaseException) -> None:
        super().__init__(
            f"module {module!r} was found, but failed while it was imported: "
            f"{type(error).__name__}: {error}{_place(error)}"
        )
        self.module = module


class AttributeMissingError(ImportFromStringError):
    """The module was imported, but has no such attribute."""

    def __init__(self, module: str, attribute: str, owner: object, missing: str) -> None:
        near = get_close_matches(missing, _public_names(owner), n=1)
        where = "" if missing == attribute else f" (in {attribute!r})"
        hint = f"did you mean {near[0]!r}?" if near else "is it defined at the top of the module?"
        super().__init__(
            f"module {module!r} was imported, but has no attribute {missing!r}{where}: {hint}"
        )
        self.module = module
        self.attribute = attribute


def load(target: str, *, directory: Path | None = None) -> object:
    """Imports the object that `target` names, as `module:attribute` or `pkg.module:obj.attr`.

    Args:
        directory: Where modules are looked for first; it stays on `sys.path`, since handlers
            import too. None leaves the path as it is.

    Raises:
        ImportFromStringError: If `target` is not of this form.
        ModuleMissingError: If there is no such module.
        ModuleFailedError: If the module raised an error, or exited, while it was imported.
        AttributeMissingError: If the module has no such attribute.
    """
    module_name, attribute = _split(target)
    if directory is not None and (folder := str(directory.absolute())) not in sys.path:
        sys.path.insert(0, folder)
    found: object = _import(module_name)
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise AttributeMissingError(module_name, attribute, found, name) from None
    return found


def traceback_of(error: ModuleFailedError) -> str:
    """The module's own traceback, without the frames that only import it."""
    assert error.__cause__ is not None
    told = traceback.TracebackException.from_exception(error.__cause__)
    frames = [frame for frame in told.stack if not frame.filename.startswith(_IMPORTING)]
    told.stack = traceback.StackSummary.from_list(frames)
    return "".join(told.format())


def _split(target: str) -> tuple[str, str]:
    module, _, attribute = target.partition(":")
    # "app.py" is a dotted name too, but nobody calls a module py.
    if _is_dotted_name(module) and _is_dotted_name(attribute) and not module.endswith(".py"):
        return module, attribute
    raise ImportFromStringError(
        f"{target!r} is not of the form MODULE:ATTRIBUTE: did you mean "
        f"{_suggestion(module, attribute)!r}?"
    )


def _is_dotted_name(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _suggestion(module: str, attribute: str) -> str:
    """A target that the user may have meant: `src/app.py` becomes `src.app:mux`."""
    dotted = module.removesuffix(".py").replace("/", ".").replace("\\", ".").strip(".")
    module = dotted if _is_dotted_name(dotted) else "app"
    return f"{module}:{attribute if _is_dotted_name(attribute) else 'mux'}"


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # The name tells whose module is missing: this one, or a package it would be in, or
        # one that it imports itself.
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise ModuleMissingError(name, error.name) from None
        raise ModuleFailedError(name, error) from error
    except (Exception, SystemExit) as error:  # SystemExit: a script without a __main__ guard
        raise ModuleFailedError(name, error) from error


def _place(error: BaseException) -> str:
    """The last line of the user's own code on the way to the error, libraries left out."""
    if isinstance(error, SyntaxError):
        return ""  # its text says where
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_NOT_THE_USERS):
            return f" ({frame.filename}, line {frame.lineno})"
    return ""


def _public_names(owner: object) -> list[str]:
    return [name for name in dir(owner) if not name.startswith("_")]
