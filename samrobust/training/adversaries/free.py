"""Free adversarial training: the pass that trains the weights also moves the images.

Reference: Shafahi et al. (2019), arXiv 1904.12843, Algorithm 1.
"""

import jax.numpy as jnp

from samrobust.checks import check_radius, count
from samrobust.training.adversaries.radii import PGD_FIELDS, check_options
from samrobust.training.parts import Adversary
from samrobust.types import Array, Entry, Field, LogitsFn, PyTree

__all__ = ["ENTRY", "free"]


def free(epsilon: float) -> Adversary:
    """Builds Free-AT: d <- clip(d + eps sign(g), -eps, eps), g of the step's own pass.

    Each batch is trained on in `replays` steps in a row (m in a row's name), with the
    same augmentation (in a loop of one's own: `fit(..., replays=m)`); d persists over
    replays and over batches. There are as many steps as without replays: the data are
    seen `epochs / replays` times, as the authors have it. A step costs one pass with
    weight gradients, and what of its first layer belongs to the gradient of the images.

    Args:
      epsilon: radius in 1/255 units, in the l-inf norm, and the length of the step.

    Returns:
      An adversary whose memory is d, [B, H, W, C], for each place in a batch. An
      incomplete batch moves the first places alone.

    Raises:
      ValueError: for a value out of range.

    Reference: Shafahi et al. (2019), arXiv 1904.12843, Algorithm 1, with the projection
    of d onto the box of locuslab/fast_adversarial, train_free.py. *Our deviation*: at
    the first replay of a batch x + d is clipped into the box, where that code uses a d
    that was clipped for the images before.
    """
    check_radius("linf", epsilon=epsilon)
    radius = epsilon / 255

    def perturb(
        logits_fn: LogitsFn, images: Array, labels: Array, state: PyTree, *, key: Array
    ) -> tuple[Array, PyTree]:
        del logits_fn, labels, key
        count = len(images)
        delta = jnp.clip(state[:count], -images, 1 - images)
        # x + (1 - x) may round to more than 1.
        return jnp.clip(images + delta, 0, 1), state.at[:count].set(delta)

    def learn(
        state: PyTree, images: Array, labels: Array, gradients: Array, correct: Array
    ) -> PyTree:
        del labels, correct
        count = len(images)
        delta = state[:count]
        natural = images - delta
        moved = jnp.clip(delta + radius * jnp.sign(gradients), -radius, radius)
        return state.at[:count].set(jnp.clip(moved, -natural, 1 - natural))

    return Adversary(perturb, jnp.zeros_like, learn)


ENTRY = Entry(
    free,
    "Free-AT (eps = {eps:g}/255, m = {m})",
    options={"eps": "epsilon", "m": "replays"},
    # Steps in a row that a batch is trained on; all batches are full ones then.
    fields={"epsilon": PGD_FIELDS["epsilon"], "replays": Field(8, count)},
    attack_passes=0.0,
    check=check_options,
)
