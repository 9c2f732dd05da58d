"""Attacks on image classifiers, in JAX, for any `logits_fn`.

    attack = pgd(linf(8 / 255), step_size=2 / 255, num_steps=10)
    adversarial = attack(logits_fn, images, labels, key=key)

An attack is a pure function: configuration at construction, data at call; it works
inside and outside `jax.jit`, `vmap` and `shard_map`, with models of Flax, Equinox or
plain functions. Images are [B, ...] with pixels in [0, 1], labels int [B], radii in
pixel units; radii and keys are one for all examples or one for each. Anything else is
refused by name (`samrobust.attacks.calls`). Logits whose highest is NaN or infinite
count as a mistake. Normalization belongs in `logits_fn`. Out of scope: training, data
sets, accuracy (see `samrobust.evaluation`).

One file is one algorithm; what all of them share is in `balls`, `calls`, `draws`,
`numbers` and `per_example`. `margins` measures a network around its images.
"""

from samrobust.attacks.apgd import apgd, apgd_targeted
from samrobust.attacks.autoattack import (
    MEMBERS,
    VERSIONS,
    AutoAttack,
    Member,
    autoattack,
)
from samrobust.attacks.balls import Ball, l2, linf
from samrobust.attacks.ddn import ddn
from samrobust.attacks.fab import fab_minimal, fab_targeted
from samrobust.attacks.fgsm import fgsm
from samrobust.attacks.hyperplanes import step_onto_hyperplane
from samrobust.attacks.losses import cross_entropy, dlr, margin, targeted_dlr
from samrobust.attacks.margins import (
    boundary_distance,
    input_gradient_norm,
    local_linearity_error,
)
from samrobust.attacks.noise import noise
from samrobust.attacks.pgd import JUDGES, StagedPgd, identity, pgd, staged_pgd
from samrobust.attacks.square import square

__all__ = [
    "ATTACKS_VERSION",
    "JUDGES",
    "MEMBERS",
    "VERSIONS",
    "AutoAttack",
    "Ball",
    "Member",
    "StagedPgd",
    "apgd",
    "apgd_targeted",
    "autoattack",
    "boundary_distance",
    "cross_entropy",
    "ddn",
    "dlr",
    "fab_minimal",
    "fab_targeted",
    "fgsm",
    "identity",
    "input_gradient_norm",
    "l2",
    "linf",
    "local_linearity_error",
    "margin",
    "noise",
    "pgd",
    "square",
    "staged_pgd",
    "step_onto_hyperplane",
    "targeted_dlr",
]

# Raised whenever an attack returns other images than before, beyond rounding: stored
# outcomes of an older version are then discarded.
ATTACKS_VERSION = 2
