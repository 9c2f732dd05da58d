"""One pure training step for every method: ST, SAM, AT and their combinations.

    min_w E[ max_{e in W} max_{d in X} loss(w + e; x + d, y) ]

The maximisation over the inputs is the `attack`, the one over the weights is the
`samrobust.sharpness.sam` in the optimizer. Standard training is the identity attack
and no SAM; nothing here asks which method it is. Whether a pass runs over the batch or
over groups of it is the business of `samrobust.training.passes`.
"""

from typing import Protocol, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from samrobust.attacks import identity
from samrobust.checks import check, check_choice
from samrobust.objectives import cross_entropy
from samrobust.sharpness import last_aux, last_metrics
from samrobust.training.passes import apply_in_training, make_passes
from samrobust.training.state import TrainState
from samrobust.types import Array, Attack, LossFn, PyTree

__all__ = ["TrainStep", "make_train_step"]

# Folded into a step's key for what is random in the network. The attack has the key
# itself: no split of it, nor draw from it, reaches so far.
_NETWORK = 0xFFFFFFFF


class TrainStep(Protocol):
    """`train_step(state, images, labels, key) -> (state, metrics)`; pure."""

    def __call__(
        self, state: TrainState, images: Array, labels: Array, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        """See the class."""
        ...


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformationExtraArgs,
    *,
    attack: Attack = identity,
    objective: LossFn = cross_entropy,
    sam_batch_stats: str = "both",
    attack_batch_norm: str = "train",
    group_size: int = 0,
    mesh: Mesh | None = None,
) -> TrainStep:
    """Builds the training step.

    Args:
      model: any Flax Linen network that is called with (images, train=...), with
        `batch_stats` or without, with dropout or without.
      tx: the optimizer; receives `grad_fn`, which a `sam` in it calls.
      attack: makes the images that are trained on, at the current parameters.
      objective: loss per example; its mean is minimised.
      sam_batch_stats: which pass of SAM updates BatchNorm's running statistics:
        `first` (at w), `second` (at w + e) or `both`, one after the other.
      attack_batch_norm: `train`: the attacked network is the one that trains: it
        normalises by its batch, and drops the units that the passes will drop, the
        same at every step of the attack. `eval`: it normalises by the running
        statistics and drops nothing. Neither updates the statistics.
      group_size: examples in a group with an ascent direction of its own, m of
        m-sharpness: both passes then run over each group apart, BatchNorm included,
        and `tx` begins with a `sam(..., grouped=True)`. 0: the whole batch, no groups.
      mesh: of `samrobust.parallel.data_mesh`, over which the groups are spread; None:
        one device. Of no account without groups.

    Returns:
      A pure function of (state, images float32 [B, H, W, C] in [0, 1], labels int32
      [B], key). The key is consumed by the attack; dropout draws from a key that is
      folded from it, the same in both passes of SAM (with groups, each has its own, and
      the attack that of a whole batch). Metrics are float32 scalars: `loss`
      and `accuracy` on the images trained on, `gradient_norm`, and with SAM also
      `rho`, `applied_rho`, `perturbed_gradient_norm` and `cosine` (see `SamMetrics`;
      with groups, all but `rho` are means over them).

      **Guarantees.** The adversarial images are made once, from fresh gradients, and
      shared by both passes of SAM. An attack of radius 0 and `sam(0)` give standard
      training bit for bit. Groups are the consecutive runs of `group_size` examples,
      and the result does not depend on how they lie on the devices, up to rounding.
      Running statistics move by the mean over the groups; since they are moving
      averages, that is the same as averaging statistics kept by each device.

    Raises:
      ValueError: for an unknown choice; in the step, if images, labels, logits or
        losses are not of these shapes and kinds, the groups do not divide the batch, or
        the `sam` of `tx` does not keep the statistics of its second pass,
        which are wanted.

    Reference: Wei, Zhu and Zhang (2023), equations (3) and (5). *Our deviation* from
    their code: the attack's forward passes leave the running statistics alone.

    With the batch of a device as the group and `sam_batch_stats="first"`, ascent,
    descent and statistics are those of google-research/sam, but for two things that are
    not ours: weight decay inside the loss, so in the ascent direction too, and the
    final gradient clipped to norm 5.
    """
    check_choice(("first", "second", "both"), sam_batch_stats=sam_batch_stats)
    check_choice(("train", "eval"), attack_batch_norm=attack_batch_norm)
    passes = make_passes(model, objective, group_size=group_size, mesh=mesh)

    def train_step(
        state: TrainState, images: Array, labels: Array, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        _check_batch(images, labels)
        network_key = jax.random.fold_in(key, _NETWORK)

        def attacked(images: Array) -> Array:
            if attack_batch_norm == "eval":
                return cast(Array, model.apply(state.variables, images, train=False))
            logits, _ = apply_in_training(
                model, state.params, state.batch_stats, images, network_key
            )
            return logits

        images = attack(attacked, images, labels, key=key)
        batch = (images, labels, network_key)
        first = passes.first(state.params, state.batch_stats, *batch)
        keeps_aux = last_aux(state.opt_state) is not None

        def second_pass(params: PyTree) -> PyTree:
            wanted = sam_batch_stats != "first" and bool(state.batch_stats)
            check(
                keeps_aux or not wanted,
                "sam(rho, aux=batch_stats) to train a network with BatchNorm",
                'Or choose sam_batch_stats="first".',
                aux=None,
                sam_batch_stats=sam_batch_stats,
            )
            both = sam_batch_stats == "both"
            start = first.batch_stats if both else state.batch_stats
            second = passes.second(params, start, *batch)
            return (second.grads, second.batch_stats) if keeps_aux else second.grads

        updates, opt_state = tx.update(
            first.grads, state.opt_state, state.params, grad_fn=second_pass
        )
        batch_stats = first.batch_stats
        if sam_batch_stats != "first":
            batch_stats = last_aux(opt_state, default=first.batch_stats)
        right = jnp.argmax(first.logits, axis=-1) == labels
        metrics = {
            "loss": first.loss,
            "accuracy": jnp.mean(right, dtype=jnp.float32),
            "gradient_norm": passes.norm(first.grads),
            **last_metrics(opt_state),
        }
        metrics = {name: value.astype(jnp.float32) for name, value in metrics.items()}
        return TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        ), metrics

    return train_step


def _check_batch(images: Array, labels: Array) -> None:
    """Refuses what would broadcast, or pass for pixels or classes."""
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
