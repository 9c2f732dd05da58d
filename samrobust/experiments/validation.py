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
    LARGEST_SEED,
    Rule,
    check,
    check_path,
    check_radius,
    check_real,
    check_whole,
    each,
    maybe,
    one_of,
    switch,
    text,
)
from samrobust.experiments import entries, methods, rows
from samrobust.experiments.components import check_model, model_fields, takes
from samrobust.training.adversaries import at
from samrobust.types import Config

__all__ = ["FIELDS", "fields_of", "validate"]

_SECTION = (ConfigDict, Mapping)
_MOST = 3e38  # finite in float32
_LEAST = 1e-30  # above 0 in float32
_size, _count = partial(check_whole, 0), partial(check_whole, 1)
_seed = partial(check_whole, 0, LARGEST_SEED)
# PGD judges by the rules that it trains by.
_pgd = {name: field.rule for name, field in at.ENTRY.fields.items()}


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
    "data.train_size": maybe(_count),
    "data.test_size": maybe(_count),
    "data.split_seed": _seed,
    "data.padding": partial(check_whole, 0, 4096),  # less than the images' side
    "data.flip": switch,
    "model.name": text,
    "model.dtype": one_of("float32", "bfloat16"),
    "model.batch_norm_group": _size,
    "model.mean": maybe(each(partial(check_real, -1e3, 1e3), least=1)),
    "model.std": maybe(each(partial(check_real, 1e-6, 1e6), least=1)),
    "training.epochs": _count,
    "training.batch_size": _count,
    "training.drop_remainder": switch,
    "training.optimizer": text,
    "training.learning_rate": partial(check_real, _LEAST, _MOST),
    "training.schedule": one_of("step", "cosine"),
    "training.milestones": each(partial(check_real, 1e-4, 1)),
    "training.decay_factor": partial(check_real, _LEAST, 1),
    "training.momentum": partial(check_real, 0, 1),
    "training.weight_decay": partial(check_real, 0, _MOST),
    "training.steps_per_call": _size,
    "evaluation.linf": each(partial(check_radius, "linf")),
    "evaluation.l2": each(partial(check_radius, "l2")),
    "evaluation.attack": one_of("pgd", "autoattack"),
    "evaluation.version": one_of(*VERSIONS),
    "evaluation.members": each(one_of(*MEMBERS)),
    "evaluation.linf_step": _pgd["relative_step_size.linf"],
    "evaluation.l2_step": _pgd["relative_step_size.l2"],
    "evaluation.num_steps": _pgd["num_steps"],
    "evaluation.random_start": _pgd["random_start"],
    "evaluation.restarts": _pgd["restarts"],
    "evaluation.loss": _pgd["loss"],
    "evaluation.judge": _pgd["judge"],
    "evaluation.early_stop": switch,
    "evaluation.gradient_floor": _pgd["gradient_floor"],
    "evaluation.batch_size": _count,
    "evaluation.split": one_of("test", "validation"),
    "evaluation.checkpoint": one_of("last", "best"),
    "checkpoint.minutes": partial(check_real, 0, 1e6),
    "checkpoint.keep": _count,
    "tracking.tensorboard": switch,
    "tracking.wandb": text,
}


def fields_of(config: Config) -> dict[str, Rule]:
    """Returns the rule of every field that a config may have, by its full name."""
    rules = dict(FIELDS)
    for section, name in methods.sections(config.row or "st").items():
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
        if field not in FIELDS:
            rule(**{field: _read(config, field)})
    _validate_training(config.training)
    _validate_methods(config)
    check_model(config)
    _validate_groups(config)
    _validate_evaluation(config)


def _read(config: Config, field: str) -> Any:
    value: Any = config
    for name in field.split("."):
        holds = isinstance(value, _SECTION) and name in value
        check(holds, f"a config with the field {field}", config=type(value).__name__)
        value = value[name]
    return value


def _validate_training(training: Config) -> None:
    momentum = training.momentum
    check(momentum < 1, "training.momentum < 1", **{"training.momentum": momentum})
    milestones = tuple(training.milestones)
    rising = all(a < b for a, b in itertools.pairwise((0, *milestones, 1)))
    check(
        rising,
        "increasing fractions of the training between 0 and 1",
        "The paper's are (0.75, 0.9).",
        **{"training.milestones": milestones},
    )


def _check_restarts(section: str, attack: Config) -> None:
    check(
        attack.restarts == 1 or attack.random_start,
        f"{section}.random_start when {section}.restarts > 1",
        **{f"{section}.restarts": attack.restarts},
    )


def _validate_methods(config: Config) -> None:
    """Builds the row's method, and refuses what a row without the part would ignore."""
    row = rows.parse_row(config.row) if config.row else rows.Row()
    active = {part.name for part in row.parts}
    for section, name in methods.sections(config.row or "st").items():
        own = config[section]
        for field, off in (("m", 0), *_ends(own)):
            check(
                name in active or field not in own or own[field] == off,
                f"a row with {name} when {section}.{field} is set",
                f"As in --config=FILE.py:{name},...",
                **{f"{section}.{field}": own.get(field), "row": config.row},
            )
    if config.row:
        methods.build(config, entries.Given(grouped=methods.group_size(config) > 0))


def _ends(section: Config) -> list[tuple[str, None]]:
    return [(name, None) for name in section if name.endswith("_end")]


def _validate_groups(config: Config) -> None:
    """m-sharpness and BatchNorm's groups; the last batch is checked with the data."""
    batch_size, group = config.training.batch_size, config.model.batch_norm_group
    field, m = methods.group_field(config)
    for name, size in ((field, m), ("model.batch_norm_group", group)):
        check(
            size == 0 or batch_size % size == 0,
            f"{name} to divide training.batch_size",
            "0 means the global batch.",
            **{name: size, "training.batch_size": batch_size},
        )
    check(
        m in (0, batch_size)
        or not takes(config.model.name, "batch_norm_group")
        or (group > 0 and m % group == 0),
        f"model.batch_norm_group > 0 that divides {field}",
        f"BatchNorm cannot reach across groups of {m} that have parameters of their "
        f"own: set --config.model.batch_norm_group={m}, or a divisor of it.",
        **{"model.batch_norm_group": group, field: m},
    )


def _validate_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    _check_restarts("evaluation", evaluation)
    _validate_autoattack(evaluation)
    check(
        evaluation.judge == "any" or not evaluation.early_stop,
        "evaluation.judge=any with evaluation.early_stop",
        "A final iterate can be right again after a broken one.",
        **{"evaluation.judge": evaluation.judge},
    )
    for name in ("linf", "l2"):
        radii, field = tuple(evaluation[name]), f"evaluation.{name}"
        check(
            len(set(radii)) == len(radii),
            f"different radii in {field}",
            **{field: radii},
        )
    needs_validation = {
        "evaluation.split": evaluation.split == "validation",
        "evaluation.checkpoint": evaluation.checkpoint == "best",
    }
    for field, needs in needs_validation.items():
        check(
            not needs or config.data.validation_size > 0,
            f"data.validation_size > 0 for {field}",
            "Set --config.data.validation_size, the number of training examples to "
            "hold out; the test set is never used to choose.",
            **{"data.validation_size": config.data.validation_size},
        )


def _validate_autoattack(evaluation: Config) -> None:
    members = tuple(evaluation.members)
    uses = evaluation.attack == "autoattack" and evaluation.version == "custom"
    check(
        bool(members) == uses,
        "evaluation.members with evaluation.attack=autoattack and "
        "evaluation.version=custom, and only there",
        **{"evaluation.members": members, "evaluation.version": evaluation.version},
    )
    check(
        evaluation.attack == "autoattack" or evaluation.version == "standard",
        "evaluation.attack=autoattack with evaluation.version",
        **{"evaluation.version": evaluation.version},
    )
    check(
        len(set(members)) == len(members),
        "different evaluation.members",
        **{"evaluation.members": members},
    )
