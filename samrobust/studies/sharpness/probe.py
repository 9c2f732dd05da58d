"""All measures of one trained network, over fixed samples of its images.

The loss is the cross entropy, natural images, BatchNorm in evaluation mode, in float32.
What is a function of the weights is taken on training images, what is a function of the
images on test images.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from samrobust.attacks import cross_entropy, fab_minimal, margins
from samrobust.checks import NORMS, check_choice, check_real, check_whole
from samrobust.data import Split, take_batch
from samrobust.evaluation import OnBatch, is_correct, make_measure
from samrobust.evaluation.diagnostics.measures import float32_copy, logits_of
from samrobust.evaluation.measure import (
    batch_size_for,
    fetch,
    jit_for_all,
    to_devices,
)
from samrobust.sharpness import measures
from samrobust.sharpness.measures import ParamsLoss
from samrobust.system.distributed import data_mesh, shard_batch
from samrobust.training.adversaries.radii import make_ball
from samrobust.types import Array, PyTree

__all__ = ["KINDS", "QUANTITIES", "ProbeSettings", "Quantity", "make_probe"]

KINDS = ("flatness", "confidence", "margin")


class Quantity(NamedTuple):
    """A measure of a network.

    Attributes:
      kind: one of `KINDS`: what it would explain robustness by.
      label: its name.
      unit: of its numbers.
    """

    kind: str
    label: str
    unit: str


_LOSS, _CURVATURE = "rise of the loss", "loss / weight²"
QUANTITIES = {
    "worst": Quantity("flatness", "worst-case sharpness", _LOSS),
    "worst_adaptive": Quantity("flatness", "adaptive worst-case", _LOSS),
    "average": Quantity("flatness", "average sharpness", _LOSS),
    "average_adaptive": Quantity("flatness", "adaptive average", _LOSS),
    "lambda_max": Quantity("flatness", "lambda max", _CURVATURE),
    "trace": Quantity("flatness", "trace", _CURVATURE),
    "relative_flatness": Quantity("flatness", "relative flatness", "loss"),
    "logit_norm": Quantity("confidence", "logit norm", "logits"),
    "logit_gap": Quantity("confidence", "logit gap", "logits"),
    "gradient_l1": Quantity("margin", "l1 input gradient", "loss / pixel"),
    "gradient_l2": Quantity("margin", "l2 input gradient", "loss / pixel"),
    "linearity_error": Quantity("margin", "linearity error", "loss"),
    "distance_linf": Quantity("margin", "linf distance", "1/255"),
    "distance_l2": Quantity("margin", "l2 distance", "1/255"),
}


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """Choice of how networks are measured.

    Attributes:
      linearity_norm, linearity_radius: the ball of the local linearity error, its
        radius in 1/255.
      num_examples: training images and test images, evenly spread.
      rho, rho_adaptive: radii of the worst-case sharpness.
      sigma, sigma_adaptive: standard deviations of the average sharpness.
      ascent_steps: of the worst-case sharpness, and of the linearity error.
      noise_draws: of the average sharpness.
      lanczos_steps: products with the Hessian for lambda_max.
      trace_draws: products with the Hessian for the trace.
      num_targets, fab_steps: effort of FAB for the distance to the boundary.
    """

    linearity_norm: str
    linearity_radius: float
    num_examples: int = 256
    rho: float = 0.1
    rho_adaptive: float = 0.5
    sigma: float = 0.01
    sigma_adaptive: float = 0.1
    ascent_steps: int = 20
    noise_draws: int = 20
    lanczos_steps: int = 20
    trace_draws: int = 50
    num_targets: int = 3
    fab_steps: int = 50

    def __post_init__(self):
        check_choice(NORMS, linearity_norm=self.linearity_norm)
        for field in dataclasses.fields(self):
            value = {field.name: getattr(self, field.name)}
            if field.type is float:
                check_real(0, float("inf"), **value)
            elif field.type is int:
                check_whole(1, **value)


Found: TypeAlias = dict[str, float]


class Measurement(NamedTuple):
    """A measurement of some of the quantities.

    Attributes:
      doing: what is measured, in words.
      cost: of an image, in gradients; predicted.
      on_train: whether it is one of training.
      measure: `measure(variables, split, key, tell) -> {name: value}`; `tell(share)` is
        told of progress.
    """

    doing: str
    cost: float
    on_train: bool
    measure: Callable[..., Found]


def make_probe(
    model: nn.Module, settings: ProbeSettings, *, batch_size: int
) -> Callable[..., Found]:
    """Builds the measuring of networks of one shape.

    Args:
      model: `apply(variables, images, train=False)` gives logits.
      settings: see there.
      batch_size: images that are taken at once; as `make_measure` takes it.

    Returns:
      `probe(variables, train, test, key, *, on_batch) -> {name: value}` over two whole
      splits, with the names of `QUANTITIES`; distances in 1/255. NaN where nothing can
      be said: no correctly classified image, or a last layer that is not `nn.Dense`.
      Compiles once for splits of one size.
    """
    model = float32_copy(model) or model
    parts = [
        *_weights_parts(model, settings, batch_size),
        *_images_parts(model, settings, batch_size),
    ]
    total = sum(part.cost for part in parts)

    def probe(
        variables: PyTree, train: Split, test: Split, key: Array, *, on_batch: OnBatch
    ) -> Found:
        found, done = dict.fromkeys(QUANTITIES, float("nan")), 0.0

        def tell(share: float) -> None:
            on_batch(int(done + share * part.cost), int(total), part.doing)

        for number, part in enumerate(parts):
            tell(0.0)
            split = train if part.on_train else test
            own_key = jax.random.fold_in(key, number)
            found |= part.measure(variables, split, own_key, tell)
            done += part.cost
        on_batch(int(total), int(total), "measured")
        return found

    return probe


def _weights_parts(
    model: nn.Module, settings: ProbeSettings, batch_size: int
) -> list[Measurement]:
    """Returns the parts that perturb weights, on training images."""
    steps, draws = settings.ascent_steps, settings.noise_draws
    worst = partial(measures.worst_case_sharpness, num_steps=steps)
    average = partial(measures.average_sharpness, num_samples=draws)
    trace = partial(measures.hessian_trace, num_samples=settings.trace_draws)

    def lambda_max(loss: ParamsLoss, params: PyTree, *, key: Array) -> Array:
        count = settings.lanczos_steps
        return measures.hessian_eigenvalues(loss, params, num_steps=count, key=key)[-1]

    def part(doing: str, cost: float, **measures: Callable[..., Array]) -> Measurement:
        @jit_for_all
        def program(variables: PyTree, images: Array, labels: Array, key: Array) -> Any:
            loss = _sample_loss(model, variables, images, labels, batch_size)
            params = variables["params"]
            return {n: of(loss, params, key=key) for n, of in measures.items()}

        def run(variables: PyTree, split: Split, key: Array, tell: Any) -> Found:
            values = fetch(program(*to_devices(variables, split), key), tell, 0.0)
            return {name: float(value) for name, value in values.items()}

        return Measurement(doing, cost, True, run)

    return [
        part(
            *("worst-case sharpness", 2.7 * (steps + 1)),
            worst=partial(worst, rho=settings.rho),
            worst_adaptive=partial(worst, rho=settings.rho_adaptive, adaptive=True),
        ),
        part(
            *("average sharpness", 1.3 * draws),
            average=partial(average, sigma=settings.sigma),
            average_adaptive=partial(
                average, sigma=settings.sigma_adaptive, adaptive=True
            ),
        ),
        part("lambda max", 4.0 * settings.lanczos_steps, lambda_max=lambda_max),
        part("trace of the Hessian", 4.0 * settings.trace_draws, trace=trace),
    ]


def _sample_loss(
    model: nn.Module, variables: PyTree, images: Array, labels: Array, batch_size: int
) -> ParamsLoss:
    """Returns the mean cross entropy as a function of the parameters alone.

    Batch by batch; each is computed again on the way back, so that memory is that of
    one batch however many there are.
    """
    count = len(labels)
    size = batch_size_for(count, batch_size)
    num_batches = -(-count // size)
    positions = np.arange(num_batches * size).reshape(num_batches, size)
    weights = np.asarray(positions < count, np.float32) / count  # the rest is padding

    def loss_fn(params: PyTree) -> Array:
        logits_fn = logits_of(model, {**variables, "params": params})

        @jax.checkpoint
        def add(total: Array, batch: tuple[Array, Array]) -> tuple[Array, None]:
            positions, weights = batch
            examples = take_batch(images, labels, positions, 0, size)
            some, own = shard_batch(examples, data_mesh())
            losses = cross_entropy(logits_fn(some), own)
            return total + jnp.sum(weights.astype(losses.dtype) * losses), None

        zero = jnp.zeros([], jnp.result_type(jnp.float32, *jax.tree.leaves(params)))
        batches = (jnp.asarray(positions % count), jnp.asarray(weights))
        return jax.lax.scan(add, zero, batches)[0]

    return loss_fn


def _images_parts(
    model: nn.Module, settings: ProbeSettings, batch_size: int
) -> list[Measurement]:
    """Returns the parts that look at images one by one."""
    ball = make_ball(settings.linearity_norm, settings.linearity_radius)
    steps, targets = settings.ascent_steps, settings.num_targets
    effort = targets * settings.fab_steps

    def flatness(variables: PyTree, images: Array, *_: Array, key: Array) -> Any:
        del key
        head = _head(model, variables, images)
        if head is None:
            return {}
        return {"relative_flatness": measures.relative_flatness(*head)}

    def slopes(variables: PyTree, images: Array, labels: Array, *, key: Array) -> Any:
        logits_fn = logits_of(model, variables)
        example = (logits_fn, images, labels)
        return {
            "logit_norm": measures.logit_norm(logits_fn(images)),
            "logit_gap": measures.logit_gap(logits_fn(images)),
            "gradient_l1": margins.input_gradient_norm(*example, order=1),
            "gradient_l2": margins.input_gradient_norm(*example, order=2),
            "linearity_error": margins.local_linearity_error(
                *example, ball=ball, num_steps=steps, key=key
            ),
        }

    def distances(
        variables: PyTree, images: Array, labels: Array, *, key: Array
    ) -> Any:
        logits_fn, found = logits_of(model, variables), {}
        for norm in NORMS:
            around = make_ball(norm, 1.0)  # the radius plays no part
            attack = fab_minimal(
                around, num_targets=targets, num_steps=settings.fab_steps
            )
            found[f"distance_{norm}"] = 255 * margins.boundary_distance(
                *(logits_fn, images, labels), attack=attack, ball=around, key=key
            )
        return {**found, "correct": is_correct(logits_fn(images), labels)}

    def part(
        doing: str, cost: float, batch_fn: Any, *, on_train: bool = False
    ) -> Measurement:
        measure = make_measure(batch_fn, batch_size=batch_size)

        def run(variables: PyTree, split: Split, key: Array, tell: Any) -> Found:
            told = lambda done, total: tell(done / total)  # noqa: E731
            return _summary(measure(variables, split, key, on_batch=told))

        return Measurement(doing, cost, on_train, run)

    return [
        part("relative flatness", 0.3, flatness, on_train=True),
        part("logits and input gradients", 3.0 + steps, slopes),
        part("distance to the boundary", 2.7 * effort, distances),
    ]


def _summary(values: Mapping[str, np.ndarray]) -> Found:
    """Returns means over images; medians over those that are `correct`, if told."""
    correct = values.get("correct")
    if correct is None:
        return {name: float(np.mean(value)) for name, value in values.items()}
    if not correct.any():
        return {}
    distances = {n: value[correct] for n, value in values.items() if n != "correct"}
    return {name: float(np.median(value)) for name, value in distances.items()}


def _head(
    model: nn.Module, variables: PyTree, images: Array
) -> tuple[Array, Array, Array] | None:
    """Returns logits, what goes into the last layer, its kernel; None if not Dense."""
    seen = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        outputs = call(*args, **kwargs)
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            seen["head"] = (outputs, args[0], context.module.path)
        return outputs

    with nn.intercept_methods(note):
        logits = logits_of(model, variables)(images)
    outputs, features, path = seen.get("head", (None, None, ()))
    if outputs is not logits:
        return None
    layer = variables["params"]
    for name in path:
        layer = layer[name]
    return logits, cast(Array, features), layer["kernel"]
