"""Checks of a config's values and combinations, by the fields' full names.

`FIELDS` says what each field of `configs/base.py` may hold; then come the rules that
join several fields, one check a rule. Configs are checked however they were made: on
the command line `ml_collections` refuses other types, in Python code it need not.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from samrobust.checks import (
    LARGEST_SEED,
    check,
    check_choice,
    check_path,
    check_radius,
    check_real,
    check_whole,
)
from samrobust.types import Config

__all__ = ["FIELDS", "validate"]

# Of AutoAttack, as `samrobust.attacks` has them.
_VERSIONS = ("standard", "rand", "custom")
_MEMBERS = ("apgd-ce", "apgd-t", "fab-t", "square", "apgd-dlr")

_SECTION = (ConfigDict, Mapping)
_Rule = Callable[..., None]  # called with field=value; raises ValueError

_MOST = 3e38  # finite in float32
_LEAST = 1e-30  # above 0 in float32
# Of a step to its radius. Beyond ten radii steps only jump between the ball's faces;
# below this fraction a step is lost in float32's rounding of pixels.
_STEP = (1e-4, 10.0)
_size, _count = partial(check_whole, 0), partial(check_whole, 1)
_seed = partial(check_whole, 0, LARGEST_SEED)
# The reference code's 1e-10 times the batch, which is below 1e7.
_floor = partial(check_real, 0, 1e-3)


def _choice(*options: str) -> _Rule:
    return partial(check_choice, options)


def _maybe(rule: _Rule) -> _Rule:
    """The rule, or None."""

    def check_maybe(**values: Any) -> None:
        rule(**{name: value for name, value in values.items() if value is not None})

    return check_maybe


def _each(rule: _Rule, *, least: int = 0, most: int = 100) -> _Rule:
    """A tuple, or JSON's list, of such values."""

    def check_each(**values: Any) -> None:
        for name, value in values.items():
            holds = isinstance(value, tuple | list) and least <= len(value) <= most
            check(holds, f"a tuple of {least} to {most} values for {name}", **values)
            for item in value:
                rule(**{name: item})

    return check_each


def _text(**values: Any) -> None:
    for name, value in values.items():
        check(isinstance(value, str), f"text for {name}", **{name: value})


def _switch(**values: Any) -> None:
    for name, value in values.items():
        check(isinstance(value, bool), f"True or False for {name}", **{name: value})


def _percentages(**values: Any) -> None:
    for name, value in values.items():
        check(isinstance(value, _SECTION), f"columns in {name}", **{name: value})
        for column, number in value.items():
            check_real(0, 100, **{f"{name}.{column}": number})


FIELDS: dict[str, _Rule] = {
    "row": _text,
    "label": _text,
    "seed": _seed,
    "paper": _percentages,
    "data.name": _choice("cifar10", "cifar100", "digits"),
    "data.data_dir": _maybe(check_path),
    "data.manual_dir": _maybe(check_path),
    "data.validation_size": _size,
    "data.train_size": _maybe(_count),
    "data.test_size": _maybe(_count),
    "data.split_seed": _seed,
    "data.padding": partial(check_whole, 0, 32),  # the images' side
    "data.flip": _switch,
    "model.width": partial(check_whole, 1, 2**16),
    "model.blocks": _each(partial(check_whole, 1, 1000), least=1, most=10),
    "model.dtype": _choice("float32", "bfloat16"),
    "model.batch_norm_group": _size,
    "model.mean": _maybe(_each(partial(check_real, -1e3, 1e3), least=1)),
    "model.std": _maybe(_each(partial(check_real, 1e-6, 1e6), least=1)),
    "training.epochs": _count,
    "training.batch_size": _count,
    "training.drop_remainder": _switch,
    "training.learning_rate": partial(check_real, _LEAST, _MOST),
    "training.schedule": _choice("step", "cosine"),
    "training.milestones": _each(partial(check_real, 1e-4, 1)),
    "training.decay_factor": partial(check_real, _LEAST, 1),
    "training.momentum": partial(check_real, 0, 1),
    "training.weight_decay": partial(check_real, 0, _MOST),
    "training.steps_per_call": _size,
    "attack.norm": _choice("linf", "l2"),
    "attack.epsilon": partial(check_real, 0, _MOST),
    "attack.relative_step_size.linf": partial(check_real, *_STEP),
    "attack.relative_step_size.l2": partial(check_real, *_STEP),
    "attack.step_size": partial(check_real, 0, _MOST),
    "attack.num_steps": _count,
    "attack.random_start": _switch,
    "attack.restarts": _count,
    "attack.loss": _choice("cross_entropy", "margin"),
    "attack.judge": _choice("final", "any"),
    "attack.batch_norm": _choice("train", "eval"),
    "attack.gradient_floor": _floor,
    "sam.rho": partial(check_real, 0, 1e3),
    "sam.rho_end": _maybe(partial(check_real, 0, 1e3)),
    "sam.batch_stats": _choice("first", "second", "both"),
    "sam.m": _size,
    "evaluation.linf": _each(partial(check_radius, "linf")),
    "evaluation.l2": _each(partial(check_radius, "l2")),
    "evaluation.attack": _choice("pgd", "autoattack"),
    "evaluation.version": _choice(*_VERSIONS),
    "evaluation.members": _each(_choice(*_MEMBERS)),
    "evaluation.linf_step": partial(check_real, *_STEP),
    "evaluation.l2_step": partial(check_real, *_STEP),
    "evaluation.num_steps": _count,
    "evaluation.random_start": _switch,
    "evaluation.restarts": _count,
    "evaluation.loss": _choice("cross_entropy", "margin"),
    "evaluation.judge": _choice("final", "any"),
    "evaluation.early_stop": _switch,
    "evaluation.gradient_floor": _floor,
    "evaluation.batch_size": _count,
    "evaluation.split": _choice("test", "validation"),
    "evaluation.checkpoint": _choice("last", "best"),
    "checkpoint.minutes": partial(check_real, 0, 1e6),
    "checkpoint.keep": _count,
    "tracking.tensorboard": _switch,
    "tracking.wandb": _text,
}


def validate(config: Config) -> None:
    """Refuses values of another type or out of range, and impossible combinations.

    Raises:
      ValueError: `Expected <condition>, got <field>=<value>.`
    """
    for field, rule in FIELDS.items():
        rule(**{field: _read(config, field)})
    _validate_training(config.training)
    _validate_attack(config.attack)
    _validate_sam(config.sam)
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


def _validate_attack(attack: Config) -> None:
    if attack.epsilon > 0:
        check_radius(attack.norm, **{"attack.epsilon": attack.epsilon})
        low, high = _STEP
        check(
            low <= attack.step_size / attack.epsilon <= high,
            f"a step of {low:g} to {high:g} radii",
            **{
                "attack.step_size": attack.step_size,
                "attack.epsilon": attack.epsilon,
            },
        )
    _check_restarts("attack", attack)


def _check_restarts(section: str, attack: Config) -> None:
    check(
        attack.restarts == 1 or attack.random_start,
        f"{section}.random_start when {section}.restarts > 1",
        **{f"{section}.restarts": attack.restarts},
    )


def _validate_sam(sam: Config) -> None:
    if sam.rho_end is not None:
        check(
            sam.rho > 0 or sam.rho_end == 0,
            "sam.rho > 0 when sam.rho_end is set",
            "Use a SAM row: a schedule needs a start above 0.",
            **{"sam.rho": sam.rho, "sam.rho_end": sam.rho_end},
        )


def _validate_groups(config: Config) -> None:
    """m-sharpness and BatchNorm's groups; the last batch is checked with the data."""
    batch_size, m = config.training.batch_size, config.sam.m
    group = config.model.batch_norm_group
    for field, size in (("sam.m", m), ("model.batch_norm_group", group)):
        check(
            size == 0 or batch_size % size == 0,
            f"{field} to divide training.batch_size",
            "0 means the global batch.",
            **{field: size, "training.batch_size": batch_size},
        )
    if m == 0:
        return
    check(
        config.sam.rho > 0,
        "sam.rho > 0 when sam.m is set",
        "Use a SAM row, as in --config=FILE.py:sam,rho=0.2; without SAM there is no "
        "ascent direction.",
        **{"sam.rho": config.sam.rho, "sam.m": m},
    )
    check(
        m == batch_size or (group > 0 and m % group == 0),
        "model.batch_norm_group > 0 that divides sam.m",
        f"BatchNorm cannot reach across groups of {m} that have parameters of their "
        f"own: set --config.model.batch_norm_group={m}, or a divisor of it.",
        **{"model.batch_norm_group": group, "sam.m": m},
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
