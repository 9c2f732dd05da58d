"""Checks of a config's values and combinations, by the fields' full names.

`FIELDS` says what each field of `configs/base.py` may hold, the methods' constructors
and `samrobust.experiments.methods` what those of their sections; then come the rules
that join several fields, one check a rule. Configs are checked however they were made:
on the command line `ml_collections` refuses other types, in Python code it need not.
"""

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from samrobust.attacks.autoattack import MEMBERS, VERSIONS
from samrobust.checks import (
    LARGEST_REAL,
    LARGEST_SEED,
    Rule,
    below_one,
    check,
    check_path,
    check_radius,
    check_real,
    check_whole,
    count,
    each,
    maybe,
    one_of,
    switch,
    text,
)
from samrobust.experiments import entries, methods
from samrobust.experiments.components import check_model, model_fields, takes
from samrobust.system.resolve import is_reference
from samrobust.types import Config

__all__ = ["FIELDS", "OF_PGD", "fields_of", "validate"]

_SECTION = (ConfigDict, Mapping)
_LEAST = 1e-30  # above 0 in float32
_size = partial(check_whole, 0)
_seed = partial(check_whole, 0, LARGEST_SEED)
# PGD judges by the rules that it trains by.
_pgd = {name: field.rule for name, field in entries.section_fields("at").items()}
_ALIKE = ("num_steps", "random_start", "restarts", "loss", "judge", "gradient_floor")
_PGD = {
    "evaluation.linf_step": _pgd["relative_step_size.linf"],
    "evaluation.l2_step": _pgd["relative_step_size.l2"],
    **{f"evaluation.{name}": _pgd[name] for name in _ALIKE},
    "evaluation.early_stop": switch,
}
OF_PGD = tuple(_PGD)


def _percentages(**values: Any) -> None:
    for name, value in values.items():
        check(isinstance(value, _SECTION), f"columns in {name}", **{name: value})
        for column, number in value.items():
            check_real(0, 100, **{f"{name}.{column}": number})


FIELDS: dict[str, Rule] = {
    "row": text,
    "label": text,
    "seed": _seed,
    "paper": _percentages,
    "data.name": text,
    "data.data_dir": maybe(check_path),
    "data.manual_dir": maybe(check_path),
    "data.validation_size": _size,
    "data.train_size": maybe(count),
    "data.test_size": maybe(count),
    "data.split_seed": _seed,
    "data.padding": partial(check_whole, 0, 4096),  # less than the images' side
    "data.flip": switch,
    "data.augmentation": text,
    "model.name": text,
    "model.dtype": one_of("float32", "bfloat16"),
    "model.batch_norm_group": _size,
    "model.mean": maybe(each(partial(check_real, -1e3, 1e3), least=1)),
    "model.std": maybe(each(partial(check_real, 1e-6, 1e6), least=1)),
    "training.epochs": count,
    "training.batch_size": count,
    "training.deterministic": switch,
    "training.drop_remainder": switch,
    "training.optimizer": text,
    "training.learning_rate": partial(check_real, _LEAST, LARGEST_REAL),
    "training.schedule": one_of("step", "cosine", "cyclic"),
    "training.milestones": each(partial(check_real, 1e-4, 1)),
    "training.decay_factor": partial(check_real, _LEAST, 1),
    "training.momentum": below_one,
    "training.weight_decay": partial(check_real, 0, LARGEST_REAL),
    "training.steps_per_call": _size,
    "evaluation.linf": each(partial(check_radius, "linf")),
    "evaluation.l2": each(partial(check_radius, "l2")),
    "evaluation.attack": one_of("pgd", "autoattack"),
    "evaluation.version": one_of(*VERSIONS),
    "evaluation.members": each(one_of(*MEMBERS)),
    **_PGD,
    "evaluation.batch_size": _size,
    "evaluation.split": one_of("test", "validation"),
    "evaluation.checkpoint": one_of("last", "best", "both"),
    "checkpoint.minutes": partial(check_real, 0, 1e6),
    "checkpoint.keep": count,
    "tracking.tensorboard": switch,
    "tracking.wandb": text,
}


def fields_of(config: Config) -> dict[str, Rule]:
    """Returns the rule of every field that a config may have, by its full name."""
    rules = dict(FIELDS)
    for section, name in methods.sections(config.row).items():
        for key, field in entries.section_fields(name).items():
            rules[f"{section}.{key}"] = field.rule
    for key, field in model_fields(config.model.name).items():
        rules[f"model.{key}"] = field.rule
    return rules


def validate(config: Config) -> None:
    """Refuses values of another type or out of range, and impossible combinations.

    Raises:
      ValueError: `Expected <condition>, got <field>=<value>.`
    """
    for field, rule in FIELDS.items():
        rule(**{field: _read(config, field)})
    for field, rule in fields_of(config).items():  # known now that names are texts
        rule(**{field: _read(config, field)})
    _validate_training(config)
    _validate_methods(config)
    check_model(config)
    _validate_groups(config)
    _validate_evaluation(config)
    _validate_autoattack(config)


def _read(config: Config, field: str) -> Any:
    value: Any = config
    for name in field.split("."):
        holds = isinstance(value, _SECTION) and name in value
        check(holds, f"a config with the field {field}", config=type(value).__name__)
        value = value[name]
    return value


def _require(
    config: Config, holds: bool, condition: str, *fields: str, fix: str = ""
) -> None:
    """Refuses a config unless `holds`; the message has the values of these fields."""
    check(holds, condition, fix, **{field: _read(config, field) for field in fields})


def _validate_training(config: Config) -> None:
    milestones = "training.milestones"
    points = (0, *_read(config, milestones), 1)
    rising = all(a < b for a, b in itertools.pairwise(points))
    wanted = "increasing fractions of the training between 0 and 1"
    fix = "The paper's are (0.75, 0.9)."
    _require(config, rising, wanted, milestones, fix=fix)


def _validate_methods(config: Config) -> None:
    """Builds the row's method, and refuses what a row without the part would ignore."""
    active = {part.name for part in methods.parts_of(config)}
    for section, name in methods.sections(config.row).items():
        if name in active:
            continue
        options = entries.options(name).values()
        for key, field in entries.section_fields(name).items():
            counts = key in ("m", "start", *options) or key.endswith("_end")
            _require(
                config,
                not counts or config[section][key] == field.default,
                f"a row with {name} when {section}.{key} is set",
                *(f"{section}.{key}", "row"),
                fix=f"As in --config=FILE.py:{name},...",
            )
    for name in filter(entries.replaces_optimizer, active):
        optimizer = "training.optimizer"
        holds = _read(config, optimizer) == "sgd"
        fix = f"{name} steps by itself, with the momentum and weight decay of SGD."
        _require(config, holds, f"{optimizer}=sgd with {name}", optimizer, fix=fix)
    if config.row:  # the user's own see the numbers of the data alone: `rehearsal`
        built_in = {name for name in active if not is_reference(name)}
        methods.build(config, methods.supposed(config), only=built_in)


def _validate_groups(config: Config) -> None:
    """Refuses groups that do not fit; the last batch is checked with the data."""
    whole, group = "training.batch_size", "model.batch_norm_group"
    field, m = methods.group_field(config)
    batch_size, size = _read(config, whole), _read(config, group)
    for name, part in ((field, m), (group, size)):
        holds = part == 0 or batch_size % part == 0
        fix = "0 means the global batch."
        _require(config, holds, f"{name} to divide {whole}", name, whole, fix=fix)
    _require(
        config,
        m in (0, batch_size)
        or not takes(config.model.name, "batch_norm_group")
        or (size > 0 and m % size == 0),
        f"{group} > 0 that divides {field}",
        *(group, field),
        fix=f"BatchNorm cannot reach across groups of {m} that have parameters of "
        f"their own: set --config.{group}={m}, or a divisor of it.",
    )
    alone = methods.chosen(config, batch_size)
    _require(
        config,
        size in (0, batch_size) or alone % size == 0,
        f"{group} that divides the {alone} of {batch_size} examples that the method "
        "takes a pass over",
        *(group, "row"),
        fix="0 means all examples of a pass.",
    )


def _validate_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    holds = evaluation.restarts == 1 or evaluation.random_start
    wanted = "evaluation.random_start when evaluation.restarts > 1"
    _require(config, holds, wanted, "evaluation.restarts")
    holds = evaluation.judge == "any" or not evaluation.early_stop
    wanted = "evaluation.judge=any with evaluation.early_stop"
    fix = "A final iterate can be right again after a broken one."
    _require(config, holds, wanted, "evaluation.judge", fix=fix)
    for name in ("evaluation.linf", "evaluation.l2"):
        _require(config, _differ(config, name), f"different radii in {name}", name)
    held_out = "data.validation_size"
    fix = (
        f"Set --config.{held_out}, the number of training examples to hold out; the "
        "test set is never used to choose."
    )
    for name, without in (("split", "test"), ("checkpoint", "last")):
        holds = evaluation[name] == without or _read(config, held_out) > 0
        wanted = f"{held_out} > 0 for evaluation.{name}"
        _require(config, holds, wanted, held_out, fix=fix)


def _validate_autoattack(config: Config) -> None:
    version, members = "evaluation.version", "evaluation.members"
    is_used, is_custom = config.evaluation.attack == "autoattack", f"{version}=custom"
    named = is_used and config.evaluation.version == "custom"
    wanted = f"{members} with evaluation.attack=autoattack and {is_custom}, and only "
    holds = bool(config.evaluation.members) == named
    _require(config, holds, f"{wanted}there", members, version)
    holds = is_used or config.evaluation.version == "standard"
    _require(config, holds, f"evaluation.attack=autoattack with {version}", version)
    _require(config, _differ(config, members), f"different {members}", members)


def _differ(config: Config, field: str) -> bool:
    values = _read(config, field)
    return len(set(values)) == len(values)
