"""From a config's fields to the objects they describe.

The one place where the parts of an experiment are put together: data, network, method,
schedule, attacks. Out of scope: validation, see `samrobust.experiments.validation`.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from samrobust import attacks
from samrobust.attacks.losses import LOSSES
from samrobust.checks import NORMS, check
from samrobust.data import (
    DATASETS,
    Dataset,
    DatasetFacts,
    check_padding,
    dataset_facts,
    load_dataset,
)
from samrobust.experiments import entries, methods
from samrobust.experiments.components import (
    augmentation,
    decay_of_gradient,
    make_model,
    make_optimizer,
    optimizer_takes,
)
from samrobust.experiments.reporting.names import column_of
from samrobust.system.distributed import data_mesh
from samrobust.system.jaxprs import abstract_key
from samrobust.system.resolve import is_reference, running
from samrobust.training import Method, make_train_step
from samrobust.training.adversaries.radii import make_ball
from samrobust.training.epoch import EpochPlan, LoopState, make_plan as cut_epoch
from samrobust.training.fit import fresh_carry
from samrobust.training.phases import (
    Phase,
    check_total_steps,
    earlier_phases,
    first_epoch,
    waiting,
)
from samrobust.types import Array, Attack, Config, PyTree

__all__ = [
    "Training",
    "augmentation",
    "autoattacks",
    "check_images",
    "check_l2",
    "check_radii",
    "evaluation_attacks",
    "largest_radius",
    "learning_rate_schedule",
    "load_data",
    "load_facts",
    "load_facts_or_data",
    "make_model",
    "make_plan",
    "make_training",
    "staged_attacks",
    "validation_attacks",
]


def load_data(config: Config) -> Dataset:
    """Returns the data set of `config.data`."""
    fields = ("data_dir", "manual_dir", "validation_size", "train_size", "test_size")
    options = {name: config.data[name] for name in (*fields, "split_seed")}
    return load_dataset(config.data.name, **options)


def load_facts(config: Config) -> DatasetFacts:
    """Returns what is known of the data set of `config.data` without its images."""
    return dataset_facts(config.data.name, data_dir=config.data.data_dir)


def load_facts_or_data(config: Config) -> Dataset | DatasetFacts:
    """Returns what a network trained on `config.data` has to be compared with.

    The facts of a built-in data set, which does not change; all of any other.
    """
    is_built_in = config.data.name in DATASETS
    return load_facts(config) if is_built_in else load_data(config)


def check_radii(config: Config, dataset: Dataset | DatasetFacts) -> None:
    """Refuses l2 radii, of the evaluation or the row, that hold all of the images.

    Raises:
      ValueError: see above; names the field, in 1/255 units.
    """
    check_l2(dataset, "evaluation.l2", config.evaluation.l2)
    for part in methods.parts_of(config):
        values = methods.values_of(config, part.name)
        if part.name in entries.REGISTRY and values.get("norm") == "l2":
            field = f"{entries.section_of(part.name)}.epsilon"
            check_l2(dataset, field, [values["epsilon"]])


def check_images(config: Config, dataset: Dataset) -> None:
    """Refuses what does not fit the images: padding, and radii as `check_radii`.

    Raises:
      ValueError: see above; names the field.
    """
    check_padding(dataset.image_shape, **{"data.padding": config.data.padding})
    check_radii(config, dataset)


def check_l2(
    dataset: Dataset | DatasetFacts, field: str, radii: Iterable[float]
) -> None:
    """Refuses radii in 1/255 beyond the diagonal of the images, by their field."""
    shape, largest = dataset.image_shape, largest_radius(dataset, "l2")
    wanted = f"{field} <= {largest}, the diagonal of images {shape}"
    fix = "Radii are in 1/255 units: a larger ball holds all images."
    for radius in radii:
        check(radius <= largest, wanted, fix, **{field: radius})


def largest_radius(dataset: Dataset | DatasetFacts, norm: str) -> int:
    """Returns the radius in 1/255 of the ball that holds all images, rounded down."""
    if norm == "linf":
        return 255
    return math.isqrt(255**2 * math.prod(dataset.image_shape))


def make_plan(config: Config, num_examples: int) -> EpochPlan:
    """Returns how an epoch is cut into batches and calls.

    Raises:
      ValueError: if there is not one batch, or the devices do not divide a full one, or
        the groups of m-sharpness or BatchNorm the incomplete last one, or if that
        would be replayed.
    """
    training = config.training
    fields = ("batch_size", "drop_remainder")
    with entries.renamed({name: f"training.{name}" for name in fields}):
        plan = cut_epoch(
            num_examples,
            training.batch_size,
            steps_per_call=training.steps_per_call,
            drop_remainder=training.drop_remainder,
            replays=methods.replays(config),
        )
    batch_norm = "model.batch_norm_group", config.model.batch_norm_group
    last, alone = plan.remainder, methods.chosen(config, plan.remainder)
    groups = (methods.group_field(config), last), (batch_norm, last)
    for (field, size), count in (*groups, (batch_norm, alone)):
        of = "" if count == last else "the examples chosen of "
        wanted = f"{of}the last batch of an epoch, {count} of {num_examples} examples, "
        fix = "Set training.drop_remainder, or choose a size that divides it."
        holds = size in (0, training.batch_size) or count % size == 0
        check(holds, f"{wanted}divisible by {field}", fix, **{field: size})
    return plan


class Training(NamedTuple):
    """A config's row, built on its data: what `samrobust.training.fit` takes of it.

    Attributes:
      method: with all of its parts on.
      begin: from a key to what a run begins with, and its checkpoints hold.
      earlier: the phases before they are.
      admit: as of `Averaging`; None if no average asks for it.
      learning_rate: its schedule, to be logged.
    """

    method: Method
    begin: Callable[[Array], LoopState]
    earlier: tuple[Phase, ...]
    admit: Callable[..., PyTree] | None
    learning_rate: optax.Schedule


def make_training(
    config: Config, dataset: Dataset | DatasetFacts, steps_per_epoch: int
) -> Training:
    """Builds the training of a config's row; computes nothing yet.

    Args:
      config: validated.
      dataset: that of `config.data`; its shapes and facts alone count.
      steps_per_epoch: for the schedules.
    """
    model, training = make_model(config, dataset), config.training
    variables = _variables_of(model, config.model.name, dataset)
    _check_decay(config)
    learning_rate = learning_rate_schedule(config, steps_per_epoch)
    links = make_optimizer(config, learning_rate)
    given = entries.Given(
        optimizer=optax.chain(*links),
        learning_rate=learning_rate,
        momentum=training.momentum,
        aux=variables.get("batch_stats", {}),
        grouped=methods.group_size(config) > 0,
        weight_decay=decay_of_gradient(config),
        num_classes=dataset.num_classes,
        total_steps=training.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
    )
    parts = methods.build(config, given)
    starts = parts.pop("starts")
    sharpness = parts.pop("sharpness", optax.identity())
    averaging = parts.get("averaging")
    is_whole = any(entries.is_optimizer(p.name) for p in methods.parts_of(config))

    def make(absent: Collection[str]) -> Method:
        """Builds the method without what is yet to begin."""
        chosen, options, ascent = dict(parts), {}, sharpness
        if "adversary" in absent:
            chosen["adversary"] = waiting(parts["adversary"])
        if "sharpness" in absent:
            ascent = waiting(sharpness)
        else:
            options["group_size"] = methods.group_size(config)
        tx, mesh = ascent if is_whole else optax.chain(ascent, *links), data_mesh()
        method = make_train_step(model, tx, **chosen, **options, mesh=mesh)
        if averaging is None or averaging.join is None:
            return method
        natural = make_train_step(model, optax.chain(*links), averaging=averaging)
        return averaging.join(method, natural)

    method = make(())
    return Training(
        method=method,
        begin=fresh_carry(method, training.batch_size, dataset.image_shape),
        earlier=earlier_phases(lambda absent: make(absent).train_step, starts),
        admit=None if averaging is None else averaging.admit,
        learning_rate=learning_rate,
    )


def _check_decay(config: Config) -> None:
    """Refuses a part that has to know what the weight decay of an own optimizer is."""
    training, field = config.training, "training.weight_decay"
    asks = [
        part.name
        for part in methods.parts_of(config)
        if entries.has_parameter(part.name, "weight_decay")
        and not entries.replaces_optimizer(part.name)
    ]
    optimizer = training.optimizer
    decays = optimizer_takes(optimizer, "weight_decay")
    holds = training.weight_decay == 0 or not (is_reference(optimizer) and decays)
    wanted = f"{field}=0 with {training.optimizer} and {', '.join(asks)}"
    fix = "What they do depends on what decays: the gradient (SGD) or the weights."
    check(holds or not asks, wanted, fix, **{field: training.weight_decay})


def _variables_of(
    model: nn.Module, name: str, dataset: Dataset | DatasetFacts
) -> Mapping[str, Any]:
    """Returns the shapes of a network's variables.

    Traces it as it is initialized and as it is evaluated, and refuses one that cannot
    be, one with logits of another shape, and parameters that have no gradient.
    """
    facts = model, name, dataset.image_shape, dataset.num_classes
    try:
        hash(model)
    except TypeError:  # somebody's own has a field without one
        return _traced.__wrapped__(*facts)
    return _traced(*facts)


@lru_cache(maxsize=16)
def _traced(
    model: nn.Module, name: str, image_shape: tuple[int, ...], num_classes: int
) -> Mapping[str, Any]:
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    key = abstract_key()
    with running(name) if is_reference(name) else contextlib.nullcontext():
        logits, variables = jax.eval_shape(
            lambda k, x: model.init_with_output(k, x, train=False), key, images
        )
        shape, wanted = getattr(logits, "shape", logits), (1, num_classes)
        fix = "One logit for each class of the data."
        check(shape == wanted, f"{name} to return logits {wanted}", fix, logits=shape)
        # A forgotten `use_running_average=not train` or `deterministic=not train`.
        jax.eval_shape(partial(model.apply, train=False), variables, images)
    for path, leaf in jax.tree.leaves_with_path(variables.get("params", {})):
        check(
            jnp.issubdtype(leaf.dtype, jnp.inexact),
            f"parameters of {name} that have gradients",
            "Make constants attributes of the module.",
            **{jax.tree_util.keystr(path, simple=True, separator="."): leaf.dtype.name},
        )
    return variables


def evaluation_attacks(config: Config) -> dict[str, Attack]:
    """Returns the attacks of the table's columns: `natural`, `linf 1/255`, ..."""
    columns: dict[str, Attack] = {"natural": attacks.identity}
    for name, (ball, options) in _evaluation_columns(config).items():
        columns[name] = attacks.pgd(ball, judge=config.evaluation.judge, **options)
    return columns


def staged_attacks(config: Config) -> dict[str, attacks.StagedPgd]:
    """Returns the same columns in stages, for an evaluation that stops early."""
    return {
        name: attacks.staged_pgd(ball, **options)
        for name, (ball, options) in _evaluation_columns(config).items()
    }


def autoattacks(config: Config) -> dict[str, attacks.AutoAttack]:
    """Returns AutoAttack for every column; it has its own `gradient_floor`."""
    version, members = config.evaluation.version, tuple(config.evaluation.members)
    return {
        name: attacks.autoattack(ball, version=version, members=members)
        for name, (ball, _) in _evaluation_columns(config).items()
    }


def _evaluation_columns(config: Config) -> dict[str, tuple[attacks.Ball, dict]]:
    """Returns ball and options of every column under attack, by its name, in order."""
    evaluation = config.evaluation
    columns = {}
    for norm in NORMS:
        for radius in evaluation[norm]:
            step_size = radius * evaluation[f"{norm}_step"]
            options = _pgd_options(evaluation, norm, radius, step_size)
            columns[column_of(norm, radius)] = options
    return columns


def _pgd_options(
    section: Any, norm: str, epsilon: float, step_size: float
) -> tuple[attacks.Ball, dict[str, Any]]:
    """Returns PGD's arguments, of a radius and a step size in 1/255."""
    options = {n: section[n] for n in ("num_steps", "random_start", "restarts")}
    options |= {"step_size": step_size / 255, "loss": LOSSES[section["loss"]]}
    return make_ball(norm, epsilon, section["gradient_floor"]), options


def validation_attacks(config: Config) -> dict[str, Attack]:
    """Returns how a state is judged on held-out images: as its own row means to be.

    `natural`; with an attack in training also `robust`, PGD under the same ball, step
    size and number of steps; 10 steps of a quarter of the radius where training has no
    such steps, or one, so that a row of one step is not judged by its own.
    """
    columns: dict[str, Attack] = {"natural": attacks.identity}
    for part in methods.parts_of(config):
        values = methods.values_of(config, part.name)
        if part.name in entries.REGISTRY and "epsilon" in values:
            usual = {"norm": "linf", "random_start": True, "restarts": 1}
            usual |= {"loss": "cross_entropy", "gradient_floor": 0.0}
            values, epsilon = usual | values, values["epsilon"]
            step_size = epsilon * values.get("alpha", 0.25)
            step_size = values.get("step_size", step_size)
            if values.get("num_steps", 1) == 1:
                values["num_steps"], step_size = 10, epsilon / 4
            ball, options = _pgd_options(values, values["norm"], epsilon, step_size)
            judge = values.get("judge", "final")
            columns["robust"] = attacks.pgd(ball, judge=judge, **options)
    return columns


def learning_rate_schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    Raises:
      ValueError: for more steps than an int32 counts, as optimizers do.
    """
    training = config.training
    total_steps = training.epochs * steps_per_epoch
    with entries.renamed({"epochs": "training.epochs"}):
        check_total_steps(training.epochs, steps_per_epoch)
    if training.schedule == "cosine":
        return optax.cosine_decay_schedule(training.learning_rate, total_steps)
    if training.schedule == "cyclic":
        # Wong et al. (2020): from 0 to the rate at half of the training, and back.
        half = total_steps / 2
        return lambda step: training.learning_rate * (1 - jnp.abs(step / half - 1))
    boundaries = {}
    for milestone in training.milestones:
        step = first_epoch(milestone, training.epochs) * steps_per_epoch
        boundaries[step] = boundaries.get(step, 1.0) * training.decay_factor
    return optax.piecewise_constant_schedule(training.learning_rate, boundaries)
