"""Experiment configs: loading, overriding, and what they may say.

A config file defines `get_config(row)`, which returns a locked `ConfigDict`, and
`ROWS`, the rows of its table in order. `configs/base.py` describes every field but
those of methods and networks, which are the parameters of their constructors;
`samrobust.experiments.methods` the names of rows. Radii in configs are in 1/255 units.
Everything a run could stumble over later is refused here, before any work starts.
"""

import ast
import contextlib
import difflib
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from samrobust.checks import check, shorten
from samrobust.experiments import entries, methods, rows
from samrobust.experiments.components import model_fields, optimizer_takes
from samrobust.experiments.config_files import (
    base_file,
    find_config_file,
    load_module,
    load_rows,
)
from samrobust.experiments.rows import parse_row
from samrobust.experiments.validation import OF_PGD, fields_of, validate
from samrobust.system.fields import differences, flatten, is_among
from samrobust.system.resolve import running
from samrobust.types import Config, Field

__all__ = [
    "CHANGES_NO_RESULT",
    "as_dict",
    "base_config",
    "finish",
    "load_config",
    "load_rows",
    "shaping_fields",
    "with_defaults",
]

# What may change between two starts of the same run; see `is_among`.
CHANGES_NO_RESULT = (
    *("data.data_dir", "data.manual_dir", "training.steps_per_call"),
    *("evaluation.batch_size", "checkpoint.", "paper.", "tracking."),
)
# What the paper's numbers still stand beside: chance, rounding, which are asked for.
_IS_STILL_THE_PAPERS = (
    *CHANGES_NO_RESULT,
    *("seed", "model.dtype", "training.deterministic"),
    *("evaluation.linf", "evaluation.l2"),
)

# What is read under one choice alone; a tuple of fields for each.
_READ_UNDER = {
    ("training.schedule", "step"): ("training.milestones", "training.decay_factor"),
    ("evaluation.attack", "pgd"): OF_PGD,
}


def finish(config: Config, row: str) -> Config:
    """Writes a row into an unlocked config and locks it; the end of `get_config`.

    Every method has a section, those of one's own in rows that have them. A `step_size`
    refers to the section's `epsilon` and `relative_step_size`, and follows when these
    are changed later.
    """
    parsed = parse_row(row)
    _check_sections(parsed)
    config.row = row
    config.label = parsed.label
    _complete(config)
    for part in parsed.parts:
        config.update_from_flattened_dict(part.fields)
    for name in methods.sections(row):
        section = config[name]
        if "relative_step_size" in section:
            relative = section.relative_step_size.get_ref(section.norm)
            section.step_size = section.get_ref("epsilon") * relative
    others = [f"--config.{name}={value}" for name, value in parsed.others.items()]
    return _overridden(config.lock(), others)


def _complete(config: Config) -> None:
    """Adds what a config lacks of the fields of its methods and its network."""
    for section, name in methods.sections(config.row).items():
        _add_fields(config, section, entries.section_fields(name))
    _add_fields(config, "model", model_fields(config.model.name))


def _check_sections(row: rows.Row) -> None:
    """Refuses own parts that share a section, and fields of parts the row lacks."""
    own = [part for part in row.parts if part.name not in entries.REGISTRY]
    taken = set(base_config()) if own else set()
    for part in own:
        section = entries.section_of(part.name)
        fix = f"Call it otherwise: its fields are those of config.{section}."
        wanted = f"another name than {section}"
        check(section not in taken, wanted, fix, part=part.name)
        taken.add(section)
    names = {part.name for part in row.parts}
    lacking = {s: name for s, name in methods.sections().items() if name not in names}
    for field, value in row.others.items():
        name = lacking.get(field.partition(".")[0])
        fix = "The row lacks that part, and would ignore the field: leave it out."
        condition = f"a row with {name} when {field} is set"
        check(name is None, condition, fix, **{field: value}, row=row.name)


def _add_fields(config: Config, section: str, fields: Mapping[str, Field]) -> None:
    """Adds the fields that a section lacks, with their defaults."""
    if section not in config:
        config[section] = ConfigDict()
    for name, field in fields.items():
        *folders, last = name.split(".")
        holder = config[section]
        for folder in folders:
            if folder not in holder:
                holder[folder] = ConfigDict()
            holder = holder[folder]
        if last not in holder:
            holder[last] = field.default
            if field.default is None and field.kind is not None:
                holder[last] = config_dict.placeholder(field.kind)


def base_config() -> Config:
    """Returns the fields that every config begins with, unlocked.

    Those of the network are added by `finish`, which knows which one it is.
    """
    config = load_module(base_file()).get_config()
    for section, name in methods.sections().items():
        _add_fields(config, section, entries.section_fields(name))
    return config


def with_defaults(stored: dict) -> Config:
    """Returns a config as JSON keeps it, with the base's value for fields it lacks.

    A run of an older version lacks the newest fields, and may have an older row's name.
    """
    config: Config = ConfigDict(json.loads(_defaults()), type_safe=False)
    config.update(stored)
    config.row = rows.modern_row(config.row)
    _complete(config)
    return config


@functools.cache
def _defaults() -> str:
    return base_config().to_json_best_effort()


def as_dict(config: Config) -> dict[str, Any]:
    """Returns a config in JSON's types, as `config.json` holds it."""
    return json.loads(config.to_json_best_effort())


def shaping_fields(config: Config) -> dict[str, Any]:
    """Returns the fields of a config that shape a result, by their full names."""
    fields = flatten(config)
    return {n: value for n, value in fields if not is_among(n, CHANGES_NO_RESULT)}


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Loads, overrides and validates a config.

    Args:
      path: `FILE.py` or `FILE.py:ROW`.
      overrides: in the form of the command line, `--config.training.epochs=2`.

    Returns:
      The locked config. It has the paper's numbers where it is still the paper's
      experiment: not once an override changes more than chance and rounding.

    Raises:
      ValueError: for a file, row, field or value that is not valid; names the field.
    """
    name, colon, row = path.partition(":")
    config = _call_get_config(find_config_file(name), [row] if colon else [])
    written = as_dict(config)
    config = _overridden(config, overrides)
    validate(config)
    _check_fields(config)
    _check_choices(config)
    changed = differences(written, as_dict(config))
    if not all(is_among(field, _IS_STILL_THE_PAPERS) for field in changed):
        with config.unlocked():
            config.paper = ConfigDict()
    _check_row(config, row if colon else config.row)
    return config


def _call_get_config(file: pathlib.Path, row: list[str]) -> Config:
    """Returns what the file's `get_config` does, for a row or for its own choice."""
    get_config: Any = getattr(load_module(file), "get_config", None)
    wanted = f"a function get_config(row) in {file}"
    check(callable(get_config), wanted, get_config=get_config)
    with running(f"the config file {file}"):
        config = get_config(*row)
    named = config.get("row") if isinstance(config, ConfigDict) else None
    wanted = f"get_config of {file} to return finish(config, row)"
    check(bool(named), wanted, returned=type(config).__name__, row=named)
    return config


def _overridden(config: Config, overrides: Sequence[str]) -> Config:
    """Returns a locked config with the fields changed that the command line changes."""
    if not overrides:
        return config
    _check_overrides(overrides)
    return _override(_choose_model(config, overrides), overrides)


def _check_overrides(overrides: Sequence[str]) -> None:
    fix = "As on the command line: --config.training.epochs=2."
    for item in overrides:
        holds = item.startswith("--config.") and "=" in item
        check(holds, "overrides --config.FIELD=VALUE", fix, override=item)
    fields = {item.partition("=")[0].removeprefix("--config.") for item in overrides}
    for section in methods.sections():
        one, other = f"{section}.step_size", f"{section}.relative_step_size"
        relative = any(field.startswith(f"{other}.") for field in fields)
        fix = f"The one is the other times {section}.epsilon."
        holds = not relative or one not in fields
        check(holds, f"{one} or {other}, not both", fix, overrides=list(overrides))


def _choose_model(config: Config, overrides: Sequence[str]) -> Config:
    """Applies an override of `model.name` first: it decides which fields there are.

    What the config file says of its own network says nothing of another one.
    """
    chosen = [item for item in overrides if item.startswith("--config.model.name=")]
    before = config.model.name
    config = _override(config, chosen)
    if config.model.name != before:
        with config.unlocked():
            for name in model_fields(before):
                del config.model[name]
            _complete(config)
    return config


def _override(config: Config, overrides: Sequence[str]) -> Config:
    """Sets fields as `ml_collections` does on the command line, types checked.

    Of several values of a field the last one counts.
    """
    overrides = list({item.partition("=")[0]: item for item in overrides}.values())
    for item in overrides:
        field = item.removeprefix("--config.").partition("=")[0]
        section = field.partition(".")[0].partition("[")[0]
        fix = f"Its fields: {', '.join(config)}."
        check(section in config, "a field of the config", fix, override=item)
    values = flags.FlagValues()
    argv = ["samrobust", *overrides]
    try:
        with _unwritten(config):
            options = {"flag_values": values, "sys_argv": argv}
            config_flags.DEFINE_config_dict("config", config, **options)
            values(argv)
    except Exception as error:  # of several kinds, for values that are no literals
        for item in overrides if len(overrides) > 1 else ():
            _override(config, [item])  # raises for the one that is wrong
        reason = str(error)
        with contextlib.suppress(ValueError, SyntaxError):  # of a KeyError: quoted
            reason = str(ast.literal_eval(reason))
        given, reason = shorten(" ".join(overrides)), shorten(reason)
        message = f"Expected valid fields and values, got {given}: {reason}"
        raise ValueError(message) from error
    return values.config


class _Unwritten(ConfigDict):
    """A config whose text is short."""

    def __str__(self) -> str:
        return "config"


@contextlib.contextmanager
def _unwritten(config: Config) -> Iterator[None]:
    """Spares the text of a flag's default: YAML of all fields, twice, for no reader."""
    written = type(config)
    object.__setattr__(config, "__class__", _Unwritten)
    try:
        yield
    finally:
        object.__setattr__(config, "__class__", written)


def _check_fields(config: Config) -> None:
    """Refuses fields that nothing reads; stored configs may have some, new ones not."""
    known = fields_of(config)
    for field, _ in flatten(config):
        if field not in known and not field.startswith("paper."):
            near = difflib.get_close_matches(field, known, 1)
            fix = f"Did you mean {near[0]}?" if near else ""
            check(False, "a field of configs/base.py or of a method", fix, field=field)


def _check_choices(config: Config) -> None:
    """Refuses settings that nothing reads, for something else was chosen."""
    found, optimizer = dict(flatten(config)), "training.optimizer"
    for field in differences(json.loads(_defaults()), as_dict(config)):
        for (choice, value), fields in _READ_UNDER.items():
            holds = field not in fields or found[choice] == value
            given = {field: found.get(field), choice: found[choice]}
            check(holds, f"{choice}={value} when {field} is set", **given)
        if field in ("training.momentum", "training.weight_decay"):
            parameter = field.rpartition(".")[2]
            holds = optimizer_takes(found[optimizer], parameter)
            wanted = f"an optimizer with a parameter {parameter} when {field} is set"
            given = {field: found[field], optimizer: found[optimizer]}
            check(holds, wanted, **given)


def _check_row(config: Config, wanted: str) -> None:
    """Refuses what would make the row's name and label untrue."""
    condition = f"a config of the row {wanted!r}"
    fix = "End get_config with `return finish(config, row)`."
    check(config.row == wanted, condition, fix, row=config.row)
    row = parse_row(config.row)
    label = config.label.removeprefix("Imported ")  # as `samrobust import` says
    fix = "Choose another row instead, as in --config=FILE.py:sam,rho=0.3."
    said, found = row.fields, dict(flatten(config)) | {"label": label}
    said["label"] = row.label
    for field, named in said.items():
        wanted = f"{field}={named} as the row {config.row!r} says"
        check(named == found[field], wanted, fix, **{field: found[field]})
