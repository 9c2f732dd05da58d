"""Config files: where they lie, and the rows that they list."""

import difflib
import os
import pathlib
import re
import sys
import types
import zlib
from collections.abc import Sequence
from importlib import util
from typing import Any

from samrobust.checks import check
from samrobust.experiments.rows import modern_row, parse_row
from samrobust.system.resolve import running

__all__ = ["base_file", "find_config_file", "load_module", "load_rows", "rows_named"]


def base_file() -> pathlib.Path:
    """Returns the package's own `configs/base.py`, whatever lies where one works."""
    return next(f for folder in _shipped() if (f := folder / "base.py").is_file())


def _shipped() -> list[pathlib.Path]:
    """Returns where the package's own config files lie, in a checkout or a wheel."""
    package = pathlib.Path(__file__).resolve().parents[1]
    return [package.parent / "configs", package / "_configs"]


def find_config_file(path: str) -> pathlib.Path:
    """Returns the config file of this name: as given, or the package's own.

    A shipped one may be named without folder and `.py`: `cifar10`.

    Raises:
      ValueError: if there is none; names the shipped ones.
    """
    folders, name = _shipped(), pathlib.Path(path)
    known = sorted({file.stem for folder in folders for file in folder.glob("*.py")})
    own = f"{name}.py" if path and path == name.stem else name.name
    for candidate in (name, *(folder / own for folder in folders)):
        if candidate.suffix == ".py" and os.path.isfile(candidate):
            return candidate
    near = difflib.get_close_matches(name.stem, known, 1)
    fix = f"Did you mean configs/{near[0]}.py? " if near else ""
    found = ", ".join(f"configs/{stem}.py" for stem in known if stem != "base")
    fix += f"Shipped with samrobust: {found}."
    check(False, "an existing config file NAME.py", fix, config=path)
    raise AssertionError


def load_rows(path: str, name: str = "ROWS") -> list[str]:
    """Returns rows that a config file lists, in order: those of its table.

    Args:
      path: of the file.
      name: of another list in it.
    """
    file = find_config_file(path)
    found = vars(load_module(file))
    named: Any = found.get(name)
    lists = [n for n, x in found.items() if n.isupper() and isinstance(x, list | tuple)]
    fix = "Name one of these." if lists else "Define it there."
    check(name in found, f"a list {name} in {file}", fix, lists=lists)
    check(
        isinstance(named, list | tuple) and 0 < len(named) == len(set(map(str, named))),
        f"a list {name} in {file}, its rows all different",
        **{name: named},
    )
    return [parse_row(row).name for row in named]


def rows_named(texts: Sequence[str]) -> list[str]:
    """Returns the rows that `--rows` names.

    Args:
      texts: rows and lists of config files (`FILE.py:GRID`), separated by `;`.
    """
    found = []
    for text in map(str.strip, ";".join(texts).split(";")):
        if listed := re.fullmatch(r"(.+\.py):([A-Z_][A-Z0-9_]*)", text):
            found += load_rows(*listed.groups())
        elif text:
            found.append(parse_row(modern_row(text)).name)
    return found


def load_module(file: pathlib.Path) -> types.ModuleType:
    """Runs a config file, and returns it as a module.

    Raises:
      ValueError: for whatever goes wrong in it, in one line.
    """
    of_file = zlib.crc32(str(file.resolve()).encode())  # several may be of one name
    name = f"samrobust_config_{file.stem}_{of_file:x}"
    spec = util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for their types
    try:
        with running(f"the config file {file}"):
            spec.loader.exec_module(module)
    except Exception:
        del sys.modules[name]
        raise
    return module
