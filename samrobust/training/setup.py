"""What a training is made of, from its config: the plan, the state, the step."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from samrobust import building
from samrobust.checks import check
from samrobust.data import Dataset
from samrobust.parallel import data_mesh
from samrobust.training.epoch import EpochPlan, Totals, zero_totals
from samrobust.training.state import TrainState, init_state
from samrobust.training.step import TrainStep, make_train_step
from samrobust.types import Array, Config

__all__ = ["Parts", "make_parts", "make_plan"]


class Parts(NamedTuple):
    """The pure functions of a training, and its metrics before the first step.

    Attributes:
      init: a key to the initial state.
      train_step: see `make_train_step`.
      zero_totals: see `samrobust.training.epoch`.
    """

    init: Callable[[Array], TrainState]
    train_step: TrainStep
    zero_totals: Totals


def make_plan(config: Config, num_examples: int) -> EpochPlan:
    """Cuts an epoch into batches.

    Raises:
      ValueError: if there is not one batch, or the devices do not divide a full one, or
        the groups of m-sharpness or BatchNorm the incomplete last one.
    """
    batch_size = config.training.batch_size
    plan = EpochPlan(
        num_examples,
        batch_size,
        building.resolve_steps_per_call(config),
        config.training.drop_remainder,
    )
    check(
        plan.num_steps > 0,
        f"training.batch_size <= {num_examples} (the training examples)",
        **{"training.batch_size": batch_size},
    )
    count = jax.device_count()
    check(
        batch_size % count == 0,
        f"training.batch_size divisible by the {count} devices",
        "Choose another size: with this one devices would do the same work twice.",
        **{"training.batch_size": batch_size},
    )
    groups = {
        "sam.m": config.sam.m,
        "model.batch_norm_group": config.model.batch_norm_group,
    }
    for field, size in groups.items():
        check(
            size in (0, batch_size) or plan.remainder % size == 0,
            f"the last batch of an epoch, {plan.remainder} of {num_examples} examples, "
            f"divisible by {field}",
            "Set training.drop_remainder, or choose a size that divides it.",
            **{field: size},
        )
    return plan


def make_parts(config: Config, dataset: Dataset, steps_per_epoch: int) -> Parts:
    """Builds the pure functions of a training; computes nothing yet."""
    model = building.make_model(config, dataset)
    batch_size = config.training.batch_size
    images = jax.ShapeDtypeStruct((batch_size, *dataset.image_shape), "float32")
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(lambda k, x: model.init(k, x, train=False), key, images)
    tx = building.make_optimizer(config, steps_per_epoch, variables["batch_stats"])
    train_step = make_train_step(
        model,
        tx,
        attack=building.training_attack(config),
        sam_batch_stats=config.sam.batch_stats,
        attack_batch_norm=config.attack.batch_norm,
        group_size=building.sam_group_size(config),
        mesh=data_mesh(),
    )

    def init(key: Array) -> TrainState:
        return init_state(model, tx, dataset.image_shape, key)

    labels = jax.ShapeDtypeStruct((batch_size,), "int32")
    state = jax.eval_shape(init, key)
    _, metrics = jax.eval_shape(train_step, state, images, labels, key)
    return Parts(init, train_step, zero_totals(metrics))
