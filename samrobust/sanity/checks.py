"""The sanity checks, one after the other, on a trained network.

    balls = {"linf 8/255": linf(8 / 255)}
    findings = run_sanity(model, variables, split, balls, key=key)

Gradient masking is a network without useful gradients, not one that is robust;
docs/sanity.md explains every check. Out of scope: robust accuracy itself, for which
these images are too few.
"""

import math
from collections.abc import Callable, Mapping

from flax import linen as nn

from samrobust.attacks import Ball
from samrobust.checks import check
from samrobust.data import Split
from samrobust.sanity.finding import Finding
from samrobust.sanity.look import Effort, Look, Surrogate, some_of
from samrobust.sanity.network import float32_copy
from samrobust.sanity.on_ball import ball_findings, num_ball_measures
from samrobust.sanity.on_network import NUM_NETWORK_MEASURES, network_findings
from samrobust.types import Array, PyTree

__all__ = ["run_sanity"]


def run_sanity(
    model: nn.Module,
    variables: PyTree,
    split: Split,
    balls: Mapping[str, Ball],
    *,
    transfer: Mapping[str, Surrogate] | None = None,
    num_examples: int = 256,
    batch_size: int = 256,
    effort: Effort | None = None,
    key: Array,
    on_batch: Callable[[int, int], None] = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Finding]:
    """Looks for signs that a network's robustness is an illusion.

    Args:
      model: `apply(variables, images, train=False)` gives logits [B, K], K >= 2. That
        it draws random numbers (`make_rng`) is one of the defects; it is attacked
        under one draw.
      variables: of the model.
      split: images to look at; `some_of(split, num_examples)` are taken.
      balls: by name, as in `linf 8/255`; best the largest ball of each norm that robust
        accuracy is stated for.
      transfer: other networks on the same images, by name, not empty.
      num_examples: images to look at, >= 1. With fewer than 100 little is resolved.
      batch_size: over all devices; at most the number of images is used.
      effort: see there.
      key: consumed.
      on_batch: called as `on_batch(done, total)`, in images times measurements.
      should_stop: asked after every batch.

    Returns:
      The findings: those on the network, then those on each ball.

    Raises:
      ValueError: for arguments outside their range, a ball of radius 0 among them.
      InterruptedRunError: after `should_stop`.
    """
    check(num_examples >= 1, "num_examples >= 1", num_examples=num_examples)
    check(len(split) >= 1, "a split with examples", num_examples=len(split))
    for name, ball in balls.items():
        check(
            0 < float(ball.radius) < math.inf,
            "balls of radius > 0",
            ball=name,
            radius=ball.radius,
        )
    transfer = dict(transfer or {})
    check("" not in transfer, "names for the networks of transfer", names=[*transfer])
    each = num_ball_measures(bool(transfer), float32_copy(model) is not None)
    look = Look(
        *(model, variables, transfer, some_of(split, num_examples)),
        effort or Effort(),
        batch_size=batch_size,
        num_measures=NUM_NETWORK_MEASURES + each * len(balls),
        key=key,
        on_batch=on_batch,
        should_stop=should_stop,
    )
    findings = network_findings(look)
    for name, ball in balls.items():
        findings += ball_findings(look, name, ball)
    return findings
