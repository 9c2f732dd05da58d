"""Experiment configs: loading, the rows of a table, and validation.

A config file defines `get_config(row)`, which returns a locked `ConfigDict`, and
`ROWS`, the rows of its table in order. `configs/base.py` describes every field. A row
names a training method and its strength, as the paper's tables do:

    st        sam,rho=0.2        at,norm=linf,eps=8        at+sam,norm=l2,eps=64,rho=0.1

Radii (eps) in configs are in 1/255 units. Everything a run could stumble over later is
refused here, before any work starts.
"""

import dataclasses
import json
import pathlib
import types
from collections.abc import Sequence
from importlib import util

from absl import flags
from ml_collections import ConfigDict, config_flags

from samrobust.checks import check, check_choice
from samrobust.types import Config
from samrobust.validation import validate

__all__ = [
    "Row",
    "base_config",
    "differences",
    "find_config_file",
    "finish",
    "load_config",
    "load_rows",
    "parse_row",
    "with_defaults",
]

_OPTIONS = {
    "st": (),
    "sam": ("rho",),
    "at": ("norm", "eps"),
    "at+sam": ("norm", "eps", "rho"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: a training method and its strength.

    Attributes:
      method: one of st, sam, at, at+sam.
      norm: of the training attack, linf or l2; None without one.
      eps: radius of the training attack in 1/255 units; 0 without one.
      rho: SAM's radius in the l2 norm of all parameters; 0 without SAM.
    """

    method: str
    norm: str | None = None
    eps: float = 0.0
    rho: float = 0.0

    @property
    def label(self) -> str:
        """The name in tables, as in the paper: `SAM (rho = 0.2)`."""
        attack = f"AT ({self.norm}, eps = {self.eps:g}/255)"
        sharpness = f"SAM (rho = {self.rho:g})"
        return {
            "st": "ST",
            "sam": sharpness,
            "at": attack,
            "at+sam": f"{attack} + {sharpness}",
        }[self.method]


def parse_row(row: str) -> Row:
    """Reads a row's name.

    Raises:
      ValueError: for an unknown method or option, a missing option, or a value that
        is no number.

    >>> parse_row("at,norm=linf,eps=8")
    Row(method='at', norm='linf', eps=8.0, rho=0.0)
    """
    method, *items = row.split(",")
    check_choice(tuple(_OPTIONS), method=method)
    options = {name: value for name, _, value in (i.partition("=") for i in items)}
    wanted = _OPTIONS[method]
    check(
        sorted(options) == sorted(wanted) and len(items) == len(wanted),
        f"the options {', '.join(wanted) or '(none)'} for the method {method}",
        "Examples: st; sam,rho=0.2; at,norm=linf,eps=8; at+sam,norm=l2,eps=64,rho=0.1.",
        row=row,
    )
    if "norm" in options:
        check_choice(("linf", "l2"), norm=options["norm"])
    return Row(
        method,
        options.get("norm"),
        _number(options, "eps", row),
        _number(options, "rho", row),
    )


def _number(options: dict[str, str], name: str, row: str) -> float:
    try:
        return float(options.get(name, 0.0))
    except ValueError:
        message = f"Expected a number for {name}, got row={row!r}."
        raise ValueError(message) from None


def finish(config: Config, row: str) -> Config:
    """Writes a row into an unlocked config and locks it; the end of `get_config`.

    The attack's `step_size` is a reference to its `epsilon`, and follows when that is
    changed on the command line.
    """
    parsed = parse_row(row)
    config.row = row
    config.label = parsed.label
    config.sam.rho = parsed.rho
    config.attack.epsilon = parsed.eps
    if parsed.norm is not None:
        config.attack.norm = parsed.norm
    relative = config.attack.relative_step_size[config.attack.norm]
    config.attack.step_size = config.attack.get_ref("epsilon") * relative
    return config.lock()


def base_config() -> Config:
    """The fields of `configs/base.py`, unlocked: where every config begins."""
    return _load_module(find_config_file("configs/base.py")).get_config()


def with_defaults(stored: dict) -> Config:
    """A config as JSON keeps it, with the base's value for every field it lacks.

    A run of an older version lacks the newest fields.
    """
    defaults = json.loads(base_config().to_json_best_effort())
    config = ConfigDict(defaults, type_safe=False)
    config.update(stored)
    return config


def find_config_file(path: str) -> pathlib.Path:
    """The config file of this name: as given, or the one shipped with the package.

    Raises:
      ValueError: if there is none; names the shipped ones.
    """
    package = pathlib.Path(__file__).resolve().parent
    shipped = [package.parent / "configs", package / "_configs"]
    name = pathlib.Path(path)
    candidates = [name, *(folder / name.name for folder in shipped)]
    known = sorted({file.stem for folder in shipped for file in folder.glob("*.py")})
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    found = ", ".join(f"configs/{stem}.py" for stem in known if stem != "base")
    message = f"Expected an existing config file, got config={path!r}. "
    raise ValueError(message + f"Shipped with samrobust: {found}.")


def load_rows(path: str) -> list[str]:
    """The rows of a config file's table, in order: its `ROWS`."""
    file = find_config_file(path)
    rows = getattr(_load_module(file), "ROWS", None)
    check(
        isinstance(rows, Sequence) and len(rows) > 0,
        f"a list ROWS in {file}",
        ROWS=rows,
    )
    return [str(row) for row in rows or ()]


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Loads, overrides and validates a config.

    Args:
      path: `FILE.py` or `FILE.py:ROW`.
      overrides: in the form of the command line, `--config.training.epochs=2`.

    Returns:
      The locked config.

    Raises:
      ValueError: for a file, row, field or value that is not valid; names the field.
    """
    name, _, row = path.partition(":")
    get_config = _load_module(find_config_file(name)).get_config
    config = _override(get_config(row) if row else get_config(), overrides)
    validate(config)
    _check_row(config)
    return config


def _override(config: Config, overrides: Sequence[str]) -> Config:
    """Sets fields as `ml_collections` does on the command line, types checked."""
    values = flags.FlagValues()
    argv = ["samrobust", *overrides]
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=argv
        )
        values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).replace("\\n", " ").split()).strip("'\"")
        message = f"Expected valid fields and values, got {list(overrides)}: {reason}"
        raise ValueError(message) from error
    return values.config


def _check_row(config: Config) -> None:
    """Refuses overrides that would make the row's name and label untrue."""
    row = parse_row(config.row)
    for field, named, value in (
        ("sam.rho", row.rho, config.sam.rho),
        ("attack.epsilon", row.eps, config.attack.epsilon),
        ("attack.norm", row.norm or config.attack.norm, config.attack.norm),
    ):
        check(
            named == value,
            f"{field}={named} as the row {config.row!r} says",
            "Choose another row instead, as in --config=FILE.py:sam,rho=0.3.",
            **{field: value},
        )


def differences(one: dict, other: dict) -> dict[str, tuple[object, object]]:
    """The fields in which two configs, as plain dicts, differ, by dotted names.

    >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
    {'a.b': (1, 3)}
    """
    flat, other_flat = _flatten(one), _flatten(other)
    return {
        name: (flat.get(name), other_flat.get(name))
        for name in sorted(flat.keys() | other_flat.keys())
        if flat.get(name) != other_flat.get(name)
    }


def _flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.loads(json.dumps(value))
    return flat


def _load_module(file: pathlib.Path) -> types.ModuleType:
    spec = util.spec_from_file_location(f"samrobust_config_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
