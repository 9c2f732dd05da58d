"""From a config's fields to the objects they describe.

The one place where radii turn from 1/255 units into pixel units, and names into
functions. Out of scope: validation, see `samrobust.validation`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samrobust import attacks, sharpness
from samrobust.checks import LARGEST_COUNT, check
from samrobust.data import Dataset, load_dataset
from samrobust.models import PreActResNet
from samrobust.objectives import LOSSES
from samrobust.types import Attack, Config, PyTree

__all__ = [
    "autoattacks",
    "evaluation_attacks",
    "learning_rate_schedule",
    "load_data",
    "make_ball",
    "make_model",
    "make_optimizer",
    "resolve_steps_per_call",
    "sam_group_size",
    "staged_attacks",
    "training_attack",
    "validation_attacks",
]


def load_data(config: Config) -> Dataset:
    """The data set of `config.data`."""
    fields = ("data_dir", "manual_dir", "validation_size", "train_size", "test_size")
    options = {name: config.data[name] for name in (*fields, "split_seed")}
    return load_dataset(config.data.name, **options)


def make_model(config: Config, dataset: Dataset) -> PreActResNet:
    """The network of `config.model`, normalising by its mean and std or the data's."""
    mean, std = config.model.mean, config.model.std
    return PreActResNet(
        num_classes=dataset.num_classes,
        width=config.model.width,
        blocks=tuple(config.model.blocks),
        mean=dataset.mean if mean is None else tuple(mean),
        std=dataset.std if std is None else tuple(std),
        dtype=jnp.dtype(config.model.dtype),
        batch_norm_group=_below_the_batch(config, config.model.batch_norm_group),
    )


def sam_group_size(config: Config) -> int:
    """Examples with an ascent direction of their own, `sam.m`; 0: the whole batch."""
    return _below_the_batch(config, config.sam.m)


def _below_the_batch(config: Config, size: int) -> int:
    """A group's size; 0 where it is the batch, an incomplete last one too."""
    return 0 if size == config.training.batch_size else size


def make_ball(norm: str, epsilon: float, gradient_floor: float = 0.0) -> attacks.Ball:
    """A ball of radius `epsilon` in 1/255 units."""
    if norm == "l2":
        return attacks.l2(epsilon / 255, gradient_floor=gradient_floor)
    return attacks.linf(epsilon / 255)


def training_attack(config: Config) -> Attack:
    """The attack of `config.attack`: the identity where its radius is 0."""
    attack = config.attack
    if attack.epsilon == 0:  # nothing of `pgd` is left in standard training's program
        return attacks.identity
    ball, options = _pgd_options(attack, attack.norm, attack.epsilon, attack.step_size)
    return attacks.pgd(ball, judge=attack.judge, **options)


def evaluation_attacks(config: Config) -> dict[str, Attack]:
    """The table's columns in order: `natural`, `linf 1/255`, ..., and their attacks."""
    columns: dict[str, Attack] = {"natural": attacks.identity}
    for name, (ball, options) in _evaluation_columns(config).items():
        columns[name] = attacks.pgd(ball, judge=config.evaluation.judge, **options)
    return columns


def staged_attacks(config: Config) -> dict[str, attacks.StagedPgd]:
    """The same columns in stages, for an evaluation that stops early."""
    return {
        name: attacks.staged_pgd(ball, **options)
        for name, (ball, options) in _evaluation_columns(config).items()
    }


def autoattacks(config: Config) -> dict[str, attacks.AutoAttack]:
    """AutoAttack for every column under attack; it has its own `gradient_floor`."""
    evaluation = config.evaluation
    return {
        name: attacks.autoattack(
            ball, version=evaluation.version, members=tuple(evaluation.members)
        )
        for name, (ball, _) in _evaluation_columns(config).items()
    }


def _evaluation_columns(config: Config) -> dict[str, tuple[attacks.Ball, dict]]:
    """Ball and options of every column under attack, by its name, in order."""
    evaluation = config.evaluation
    return {
        f"{norm} {radius:g}/255": _pgd_options(
            evaluation, norm, radius, radius * evaluation[relative]
        )
        for norm, relative in (("linf", "linf_step"), ("l2", "l2_step"))
        for radius in evaluation[norm]
    }


def _pgd_options(
    section: Config, norm: str, epsilon: float, step_size: float
) -> tuple[attacks.Ball, dict[str, Any]]:
    """PGD's arguments: radius and step size in 1/255, the rest from a section."""
    return make_ball(norm, epsilon, section.gradient_floor), {
        "step_size": step_size / 255,
        "num_steps": section.num_steps,
        "random_start": section.random_start,
        "restarts": section.restarts,
        "loss": LOSSES[section.loss],
    }


def validation_attacks(config: Config) -> dict[str, Attack]:
    """How a state is judged on held-out images: as its own row means to be.

    `natural`; with an attack in training also `robust`, under the same ball, step size
    and number of steps.
    """
    columns: dict[str, Attack] = {"natural": attacks.identity}
    if config.attack.epsilon:
        columns["robust"] = training_attack(config)
    return columns


def learning_rate_schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate as a function of the step.

    Raises:
      ValueError: for more steps than an int32 counts, as optimizers do.
    """
    training = config.training
    total_steps = training.epochs * steps_per_epoch
    check(
        total_steps <= LARGEST_COUNT,
        f"training.epochs <= {LARGEST_COUNT // steps_per_epoch}",
        f"An epoch has {steps_per_epoch} steps; they are counted in 32 bits.",
        **{"training.epochs": training.epochs},
    )
    if training.schedule == "cosine":
        return optax.cosine_decay_schedule(training.learning_rate, total_steps)
    boundaries = {}
    for milestone in training.milestones:
        # The first epoch that is no longer `epoch < milestone * epochs`. Rounded, as
        # 0.55 * 100 is a little more than 55 in binary.
        epoch = math.ceil(round(milestone * training.epochs, 6))
        step = epoch * steps_per_epoch
        boundaries[step] = boundaries.get(step, 1.0) * training.decay_factor
    return optax.piecewise_constant_schedule(training.learning_rate, boundaries)


def make_optimizer(
    config: Config, steps_per_epoch: int, batch_stats: PyTree
) -> optax.GradientTransformationExtraArgs:
    """SAM, coupled weight decay and SGD with momentum, in this order.

    Args:
      config: the whole config.
      steps_per_epoch: for the schedules.
      batch_stats: the structure of BatchNorm's statistics, which leave SAM's second
        pass as its auxiliary output.
    """
    return optax.chain(
        sharpness.sam(
            _rho(config, steps_per_epoch),
            aux=batch_stats,
            grouped=sam_group_size(config) > 0,
        ),
        optax.add_decayed_weights(config.training.weight_decay),
        optax.sgd(
            learning_rate_schedule(config, steps_per_epoch),
            momentum=config.training.momentum or None,
        ),
    )


def _rho(config: Config, steps_per_epoch: int) -> Any:
    """SAM's radius, or its schedule."""
    start, end = config.sam.rho, config.sam.rho_end
    if end is None:
        return start
    return optax.linear_schedule(start, end, config.training.epochs * steps_per_epoch)


def resolve_steps_per_call(config: Config) -> int:
    """Steps in one call; a loop over steps pays on accelerators, not on the CPU."""
    default = 1 if jax.default_backend() == "cpu" else 25
    return config.training.steps_per_call or default
