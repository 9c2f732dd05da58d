"""One pure training step for every method: ST, SAM, AT and any composition.

    min_w E[ max_{e in W} max_{d in X} loss(w + e; x + d, y) ]

The adversary maximizes over the inputs, a `samrobust.sharpness` transformation in the
optimizer over the weights. Standard training has neither; nothing here depends on which
method it is. `samrobust.training.passes` knows whether a pass runs over the batch or
over groups of it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from samrobust.attacks import identity
from samrobust.attacks.losses import cross_entropy, misclassified
from samrobust.checks import BATCH_NORM, BATCH_STATS, check, check_choice, shorten
from samrobust.data import Split, check_labels
from samrobust.sharpness import gradient_point, last_aux, last_metrics
from samrobust.sharpness.refusals import as_transformation, kind_of
from samrobust.sharpness.state import fresh_aux
from samrobust.system.distributed import shard_batch
from samrobust.training.parts import (
    VIEWS,
    Adversary,
    Averaging,
    Objective,
    Perturb,
    as_adversary,
    name_of,
)
from samrobust.training.passes import Views, apply_in_training, make_passes
from samrobust.training.state import TrainState
from samrobust.types import Array, Attack, LogitsFn, LossFn, PyTree

__all__ = [
    "InitFn",
    "Method",
    "TrainStep",
    "check_fits",
    "make_train_step",
    "metric_names",
]

# Folded into a step's key for what is random in the network. The adversary gets the key
# itself; no split of it and no position in a batch collides with so large a number.
_NETWORK, _OPTIMIZER = 0xFFFFFFFF, 0xFFFFFFFE


class TrainStep(Protocol):
    """Training on a batch: `(state, images, labels, key) -> (state, metrics)`; pure."""

    def __call__(
        self, state: TrainState, images: Array, labels: Array, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        """Takes one step."""
        ...


class InitFn(Protocol):
    """Initialization: `(key, images) -> state`; pure."""

    def __call__(self, key: Array, images: Array | jax.ShapeDtypeStruct) -> TrainState:
        """Returns the state before the first step."""
        ...


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method: `init, train_step = make_train_step(...)`.

    Attributes:
      init: of a key, which is consumed, and a batch [B, H, W, C] of full size, of which
        shape and dtype alone count, to the state before the first step.
      train_step: see `make_train_step`.
      logits: of a state and images [B, H, W, C] to the logits [B, K] of the network as
        it is evaluated; attacks take `jax.tree_util.Partial(method.logits, state)`.
    """

    init: InitFn
    train_step: TrainStep
    logits: Callable[[TrainState, Array], Array]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.init, self.train_step))


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    *,
    adversary: Adversary | Attack = identity,
    objective: Objective | LossFn = cross_entropy,
    averaging: Averaging | None = None,
    batch_stats: str = "both",
    group_size: int = 0,
    mesh: Mesh | None = None,
) -> Method:
    """Builds a training method: its initialization and its step.

    Args:
      model: any Flax Linen network that is called with (images, train=...), with or
        without `batch_stats` and dropout.
      tx: the optimizer, any optax transformation; receives what a sharpness method in
        it may want: `grad_fn`, which a `sam` calls; `loss_fn`, `losses`, `aux` and
        `key` (see `samrobust.sharpness`).
      adversary: makes the images that are trained on, at the current parameters; or an
        attack, for an adversary without a memory.
      objective: the loss of each example, whose mean is minimized, and the views of the
        images that it takes; or a loss of the images trained on.
      averaging: of the variables after each step, for evaluation.
      batch_stats: which pass of `samrobust.sharpness.two_pass` updates BatchNorm's
        running statistics: `first` (at w), `second` (at w + e) or `both`, one after the
        other.
      group_size: examples in a group with an ascent direction of its own, m of
        m-sharpness: both passes then run over each group apart, BatchNorm included,
        and `tx` begins with a `sam(..., grouped=True)`. 0: the whole batch, no groups.
      mesh: of `samrobust.system.distributed.data_mesh`, over which the groups are
        spread, and chosen examples; None: one device. Ignored without either.

    Returns:
      `init(key, images) -> state` and `train_step(state, images, labels, key) ->
      (state, metrics)`, pure functions of images float32 [B, H, W, C] in [0, 1], labels
      int32 [B] and a key. The step's key is consumed by the adversary; dropout draws
      from a key that is folded from it, the same in all passes and views (with groups,
      each has its own, and the adversary that of a whole batch). Metrics are float32
      scalars: `loss` and `accuracy` on the images trained on, `gradient_norm`, and with
      two passes also `rho`, `applied_rho`, `perturbed_gradient_norm` and `cosine` (see
      `TwoPassMetrics`; with groups, all but `rho` are means over them).

      **Guarantees.** The adversarial images are made once, from fresh gradients, and
      shared by both passes. An attack of radius 0, `sam(0)`, `trades_loss(0)` and
      `ema(0)` give standard training bit for bit. Groups are the consecutive runs of
      `group_size` examples, and the result does not depend on how they lie on the
      devices, up to rounding. Running statistics move by the mean over the groups;
      since they are moving averages, that is the same as averaging statistics kept by
      each device.

    Raises:
      ValueError: for an unknown choice, or a `tx` that is no transformation; in `init`,
        if the network has no `params`, or other collections of variables than these
        and `batch_stats`; in the step, if images, labels, logits, losses or what the
        adversary returns are not of these shapes and kinds, the groups do not divide
        the batch or reach the weights, or the `two_pass` of `tx` does not keep the
        statistics of its second pass although `batch_stats` asks for them.

    Reference: Wei, Zhu and Zhang (2023), equations (3) and (5). *Our deviation* from
    their code: the attack's forward passes do not update the running statistics.

    With the batch of a device as the group and `batch_stats="first"`, ascent, descent
    and statistics are those of google-research/sam, except for two things that we leave
    out: weight decay inside the loss, so in the ascent direction too, and the final
    gradient clipped to norm 5.

    >>> import flax.linen as nn
    >>> class Linear(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, images, *, train):
    ...         return nn.Dense(2)(images.reshape(len(images), -1))
    >>> init, train_step = make_train_step(Linear(), optax.sgd(0.1))
    >>> images, labels = jnp.ones([4, 2, 2, 1]), jnp.array([0, 1, 1, 1])
    >>> state = init(jax.random.key(0), images)
    >>> state, metrics = jax.jit(train_step)(state, images, labels, jax.random.key(1))
    >>> int(state.step), sorted(metrics)
    (1, ['accuracy', 'gradient_norm', 'loss'])
    """
    check_choice(BATCH_STATS, batch_stats=batch_stats)
    if not isinstance(objective, Objective):
        check(callable(objective), "a loss of logits and labels", objective=objective)
        objective = Objective(objective)
    check(
        adversary is not identity or not {*VIEWS} <= {*objective.views},
        "an adversary for an objective that compares images with attacked ones",
        "As in make_train_step(..., adversary=pgd(...)).",
        adversary="identity",
        views=objective.views,
    )
    if not isinstance(adversary, Adversary):
        adversary = as_adversary(adversary)
    check_choice(BATCH_NORM, batch_norm=adversary.batch_norm)
    check(bool(objective.views), f"views of {{{', '.join(VIEWS)}}}", views=())
    for view in objective.views:
        check_choice(VIEWS, view=view)
    tx = as_transformation(tx=tx)
    passes = make_passes(
        model,
        objective,
        group_size=group_size,
        mesh=mesh,
        image_grads=adversary.learn is not None,
    )

    def init(key: Array, images: Array | jax.ShapeDtypeStruct) -> TrainState:
        zeros = jnp.zeros(images.shape, jnp.float32)
        variables = model.init(key, zeros[:1], train=False)
        wanted = f"a network {type(model).__name__} with parameters"
        check("params" in variables, wanted, collections=sorted(variables))
        check(
            variables.keys() <= {"params", "batch_stats"},
            "a network whose variables are params and batch_stats",
            "Others would not be trained, nor kept in checkpoints.",
            collections=sorted(variables),
        )
        state = TrainState(
            step=jnp.zeros([], jnp.int32),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            opt_state=tx.init(variables["params"]),
            adversary=adversary.init(zeros),
        )
        if averaging is not None:
            state = dataclasses.replace(state, average=averaging.init(state.variables))
        return state

    def train_step(
        state: TrainState, images: Array, labels: Array, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        _check_batch(images, labels)
        network_key = jax.random.fold_in(key, _NETWORK)
        weights = gradient_point(state.params, state.opt_state)

        def attacked(images: Array) -> Array:
            if adversary.batch_norm == "eval":
                variables = {"params": weights, "batch_stats": state.batch_stats}
                return cast(Array, model.apply(variables, images, train=False))
            logits, _ = apply_in_training(
                model, weights, state.batch_stats, images, network_key
            )
            return logits

        adversarial, memory = _made(
            adversary.perturb, attacked, images, labels, state.adversary, key=key
        )
        views = {"natural": images, "adversarial": adversarial}
        if adversary.weigh is not None:
            views["weights"] = adversary.weigh(memory, labels)
        batch = (views, labels, network_key)
        first = passes.first(weights, state.batch_stats, *batch)
        keeps_aux = last_aux(state.opt_state) is not None
        traced: PyTree = None  # the statistics of a second pass, where one is traced

        def second_pass(params: PyTree, examples: Array | None = None) -> PyTree:
            nonlocal traced
            wanted = batch_stats != "first" and bool(state.batch_stats)
            check(
                keeps_aux or not wanted,
                "sam(rho, aux=batch_stats) to train a network with BatchNorm",
                'Or choose batch_stats="first".',
                aux=None,
                batch_stats=batch_stats,
            )
            # "both": the second pass updates what the first has updated.
            start = first.batch_stats if batch_stats == "both" else state.batch_stats
            second = passes.second(params, start, *_of(examples, *batch, mesh))
            traced = second.batch_stats
            return (second.grads, second.batch_stats) if keeps_aux else second.grads

        def losses_at(params: PyTree) -> Array:
            return passes.losses(params, state.batch_stats, *batch)

        # A `sam` in `tx` calls `second_pass` at w + e; nothing else traces it.
        updates, opt_state = tx.update(
            first.grads,
            state.opt_state,
            state.params,
            grad_fn=second_pass,
            loss_fn=losses_at,
            losses=first.losses,
            aux=first.batch_stats if keeps_aux else None,
            key=jax.random.fold_in(key, _OPTIMIZER),
        )
        shapes, wanted = (jax.tree.map(jnp.shape, t) for t in (updates, state.params))
        check(
            group_size == 0 or shapes == wanted,
            "an optimizer that begins with a two_pass of grouped=True",
            "Nothing else takes the mean over the groups: or choose group_size=0.",
            group_size=group_size,
        )
        statistics = first.batch_stats
        # One that waits for its start, or in a `lax.cond` not taken, has nothing new.
        if batch_stats != "first" and traced is not None:
            states = opt_state, state.opt_state
            statistics = fresh_aux(*states, traced, first.batch_stats)
        correct = ~misclassified(first.logits, labels)
        if adversary.learn is not None:
            assert first.image_grads is not None  # for type checkers
            memory = adversary.learn(
                memory, adversarial, labels, first.image_grads, correct
            )
            _check_memory(adversary.learn, state.adversary, memory)
        metrics = {
            "loss": first.loss,
            "accuracy": jnp.mean(correct, dtype=jnp.float32),
            **last_metrics(opt_state),
            # Also of a method that has yet to begin, and measures nothing.
            "gradient_norm": passes.norm(first.grads),
        }
        metrics = {name: value.astype(jnp.float32) for name, value in metrics.items()}
        following = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=statistics,
            opt_state=opt_state,
            adversary=memory,
            average=state.average,
        )
        if averaging is not None:
            average = averaging.update(state.average, following.variables, state.step)
            following = dataclasses.replace(following, average=average)
        return following, metrics

    def logits(state: TrainState, images: Array) -> Array:
        return cast(Array, model.apply(state.eval_variables, images, train=False))

    return Method(init, train_step, logits)


def _made(
    perturb: Perturb, logits_fn: LogitsFn, images: Array, *arguments: Any, key: Array
) -> tuple[Array, PyTree]:
    """Returns the images and the state that an adversary makes, both checked."""
    made: Any = perturb(logits_fn, images, *arguments, key=key)
    shown = jax.tree.map(kind_of, made)
    is_pair = isinstance(made, tuple) and len(made) == 2
    wanted = "an adversary that returns images and its next state"
    fix = "End with `return images, state`."
    check(is_pair, wanted, fix, **{name_of(perturb): shown})
    wanted = f"an adversary that returns images {kind_of(images)}, as it is given"
    check(shown[0] == kind_of(images), wanted, **{name_of(perturb): shown[0]})
    _check_memory(perturb, arguments[-1], made[1])
    return made


def _check_memory(function: Callable[..., Any], before: PyTree, after: PyTree) -> None:
    """Refuses a state of an adversary that is of another kind than the one before."""
    old, new = (jax.tree.map(kind_of, state) for state in (before, after))
    alike = jax.tree.flatten(old) == jax.tree.flatten(new)
    wanted = f"an adversary whose states are all like its first, {old}"
    fix = "Let `init` return the first."
    check(alike, shorten(wanted), fix, **{name_of(function): new})


def check_fits(method: Method, state: TrainState, split: Split) -> None:
    """Refuses labels that the network has no logit for, and weights in 64 bits."""
    wide = {
        "params" + jax.tree_util.keystr(path): str(leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
        if leaf.dtype in (jnp.float64, jnp.complex128)
    }
    fix = "For others write a loop around `make_train_step`."
    check(not wide, "weights of at most 32 bits", fix, **dict(list(wide.items())[:3]))
    if len(split):
        images = jax.ShapeDtypeStruct((1, *split.images.shape[1:]), jnp.float32)
        num_classes = jax.eval_shape(method.logits, state, images).shape[-1]
        check_labels(num_classes, labels=split.labels)


def metric_names(state: TrainState) -> tuple[str, ...]:
    """Returns the names of the metrics of a step, which the state tells untraced.

    A network that an averaging trains beside the method's own, and keeps in `average`,
    has a loss and an accuracy, which begin with its name there.
    """
    names = ["loss", "accuracy", *last_metrics(state.opt_state), "gradient_norm"]
    for name, kept in dict(state.average or {}).items():
        if isinstance(kept, TrainState):
            names += [f"{name}_loss", f"{name}_accuracy"]
    return tuple(names)


def _of(
    examples: Array | None, views: Views, labels: Array, key: Array, mesh: Mesh | None
) -> tuple[Views, Array, Array]:
    """Returns these examples of a batch, spread over the devices; by default all."""
    if examples is None:
        return views, labels, key
    chosen = jax.tree.map(lambda leaf: leaf[examples], (views, labels))
    return *(chosen if mesh is None else shard_batch(chosen, mesh)), key


def _check_batch(images: Array, labels: Array) -> None:
    """Refuses arrays that would broadcast, or be mistaken for pixels or classes."""
    check(
        images.ndim == 4 and jnp.issubdtype(images.dtype, jnp.floating),
        "float images [B, H, W, C] with pixels in [0, 1]",
        shape=images.shape,
        dtype=str(images.dtype),
    )
    check(
        labels.shape == images.shape[:1] and jnp.issubdtype(labels.dtype, jnp.integer),
        f"int labels [{len(images)}], a class for each image",
        shape=labels.shape,
        dtype=str(labels.dtype),
    )
