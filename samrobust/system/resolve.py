"""The user's own objects, named in a config as `package.module:name`.

A method, a network or a data set may live in a file of the user's: `config.json` stores
such a name unchanged, and it is resolved again wherever the run is read. Importing a
module runs it; nothing else is done here.
"""

import contextlib
import functools
import hashlib
import importlib
import os
import pathlib
import sys
import sysconfig
import traceback
import types
from collections.abc import Iterable, Iterator
from typing import Any

from samrobust.checks import CheckError, check, shorten

__all__ = ["OwnCodeError", "is_reference", "resolve", "running", "sources"]

# Lines in these folders are not where the user's own code went wrong.
_INSTALLED = (
    "<frozen",
    f"{pathlib.Path(__file__).parents[1]}{os.sep}",
    *(
        f"{sysconfig.get_path(name)}{os.sep}"
        for name in ("stdlib", "purelib", "platlib")
    ),
)


def is_reference(text: str) -> bool:
    """Returns whether a text has the form `package.module:name`.

    >>> is_reference("mine.data:flowers"), is_reference("mnist:3.0.1")
    (True, False)
    """
    module, _, name = text.partition(":")
    return name.isidentifier() and all(map(str.isidentifier, module.split(".")))


def resolve(reference: str, what: str) -> Any:
    """Returns the object that a reference names.

    Modules are found where Python finds them, and else in the current directory.

    Args:
      reference: `package.module:name`.
      what: the kind of object, for messages, as in `"a data set"`.

    Raises:
      ValueError: for another form, a module that is not found or fails, or that has
        nothing of this name; one line that says which, and what to do.

    >>> resolve("math:tau", "a number")
    6.283185307179586
    >>> resolve("mth:tau", "a number")
    Traceback (most recent call last):
    samrobust.checks.CheckError: Expected a module mth with a number, got \
reference='mth:tau'. Run in the folder that holds mth.py, or add that folder to \
PYTHONPATH.
    """
    form = f"{what} as package.module:name"
    check(is_reference(reference), form, reference=reference)
    module, _, name = reference.partition(":")
    found = _import(module, what, reference)
    public = [
        key
        for key, value in vars(found).items()
        if not key.startswith("_") and not isinstance(value, types.ModuleType)
    ]
    there = f"It has {shorten(', '.join(public)) or 'no names'}."
    wanted = f"{what} {name} in {getattr(found, '__file__', module)}"
    check(hasattr(found, name), wanted, there, reference=reference)
    return getattr(found, name)


class OwnCodeError(ValueError):
    """An error in the user's own code, in one line that says where."""


def _failure_of(what: str, error: BaseException) -> OwnCodeError:
    """Describes an error in the user's own code in one line: where, which, its text.

    Args:
      what: what was run.
      error: as caught. It is located at its last line outside of installed packages,
        or the line that Python could not parse.
    """
    frames = traceback.extract_tb(error.__traceback__)
    lines = [(frame.filename, frame.lineno) for frame in frames]
    if isinstance(error, SyntaxError):
        lines.append((error.filename or "<frozen>", error.lineno))
    own = [line for line in lines if not line[0].startswith(_INSTALLED)]
    where = f" at {own[-1][0]}, line {own[-1][1]}" if own else ""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return OwnCodeError(
        f"Expected {what} to run, got{where}: {type(error).__name__}: {shorten(text)}"
    )


@contextlib.contextmanager
def running(what: str) -> Iterator[None]:
    """Runs the user's own code, and says in one line what goes wrong in it, and where.

    Args:
      what: what is run. What a check of ours refuses is said as it is.

    Raises:
      OwnCodeError: for whatever is raised inside.
    """
    try:
        yield
    except (CheckError, OwnCodeError):
        raise
    except Exception as error:
        raise _failure_of(what, error) from error


def sources(references: Iterable[str]) -> dict[str, str]:
    """Returns the SHA-256 of the files that references name, as they were imported.

    Returns:
      Digests of the modules that are named, and of those where what is named was
      defined, by the modules' names with slashes. Installed packages are left out:
      their versions say what they are.
    """
    found = {}
    for reference in references:
        named = resolve(reference, "code")
        defined = getattr(getattr(named, "make", named), "__module__", "")
        for module in (reference.partition(":")[0], defined):
            if digest := _own_source(sys.modules.get(module)):
                found[module.replace(".", "/")] = digest
    return found


def _own_source(module: types.ModuleType | None) -> str:
    file = getattr(module, "__file__", None) or "<frozen"
    return "" if file.startswith(_INSTALLED) else _digest(file)


@functools.cache  # asked for at import: what changes later is not what runs
def _digest(file: str) -> str:
    with contextlib.suppress(OSError):
        return hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()
    return ""


def _import(module: str, what: str, reference: str) -> types.ModuleType:
    """Imports a module that may lie in the current directory."""
    importlib.invalidate_caches()  # the file may be younger than the last look
    try:
        with _current_directory_last():
            found = importlib.import_module(module)
            _own_source(found)
            return found
    except (Exception, SystemExit) as error:
        missing = getattr(error, "name", None) or ""
        # A module that is there may miss another one; that is a failure of its own.
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(
            f"{missing}."
        ):
            file = f"{missing.replace('.', '/')}.py"
            fix = f"Run in the folder that holds {file}, or add that folder to "
            fix += "PYTHONPATH."
            if missing.endswith(".py"):  # the name of the file
                fix = f"Write it without .py: {reference.replace('.py:', ':')}."
            wanted = f"a module {missing} with {what}"
            check(False, wanted, fix, reference=reference)
        raise _failure_of(f"the module {module} with {what}", error) from error


@contextlib.contextmanager
def _current_directory_last() -> Iterator[None]:
    """Adds the current directory to the path, where it hides no installed module."""
    folder = os.getcwd()
    is_there = folder in sys.path
    if not is_there:
        sys.path.append(folder)
    try:
        yield
    finally:
        if not is_there:
            sys.path.remove(folder)
