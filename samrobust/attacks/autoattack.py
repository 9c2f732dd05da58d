"""AutoAttack: an ensemble of attacks without parameters; one is enough to break.

The ensemble by which robust accuracy is compared since 2020. Each member attacks what
the ones before it left standing. It comes as a function like all attacks, and in parts,
for a caller that drops broken examples between them: see `samrobust.evaluation`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from samrobust.attacks import draws
from samrobust.attacks.apgd import apgd, apgd_targeted
from samrobust.attacks.balls import Ball, l2
from samrobust.attacks.calls import accept, check_set, warn_of_probabilities
from samrobust.attacks.fab import fab_targeted
from samrobust.attacks.losses import dlr, margin, misclassified, normalized
from samrobust.attacks.numbers import seen
from samrobust.attacks.per_example import filled, select
from samrobust.attacks.square import square
from samrobust.checks import check, check_choice
from samrobust.types import Array, Attack, LogitsFn, RandomLogitsFn

__all__ = ["MEMBERS", "VERSIONS", "AutoAttack", "Member", "autoattack"]

_NUM_TARGETS = 9
_NORM_FLOOR = 1e-12  # what the authors' code adds to the norm of a gradient
_DRAWS = 20  # of a gradient of random logits


class Member(NamedTuple):
    """An attack of the ensemble, in parts that follow each other.

    Attributes:
      name: as in the authors' code: `apgd-ce`, `apgd-t`, `fab-t`, `square`, `apgd-dlr`.
        Stored outcomes know a member by it: give one of your own another.
      num_parts: `num_parts(num_classes) -> int`, >= 1: one for each target class, if
        the member has targets.
      part: `part(logits_fn, images, labels, number, *, key) -> images`: an `Attack` for
        a part, whose number may be traced.
      cost: of a part on one example, at most, in forward passes.
    """

    name: str
    num_parts: Callable[[int], int]
    part: Callable[..., Array]
    cost: int


@dataclasses.dataclass(frozen=True)  # `jax.jit` wants a weak reference: no tuple
class AutoAttack:
    """An ensemble that is itself an `Attack`; see `autoattack`.

    Attributes:
      members: in their order.
      radius: of the ball.
      is_random: whether the classifier is called as `logits_fn(images, key=key)`.
      box: the range of pixel values.
      order: of the ball's norm, `inf` or 2.
    """

    members: tuple[Member, ...]
    radius: float
    is_random: bool
    box: tuple[float, float] = (0.0, 1.0)
    order: float = float("inf")

    def __call__(
        self,
        logits_fn: LogitsFn | RandomLogitsFn,
        images: Array | np.ndarray,
        labels: Array | np.ndarray,
        *,
        key: Array,
    ) -> Array:
        """Runs all members in order, each on the whole batch."""
        # Before the first member, as Square alone needs it, which is the last.
        has_square = any(member.name == "square" for member in self.members)
        logits_fn, images, labels, key = accept(
            *(logits_fn, images, labels, key),
            box=self.box,
            is_random=self.is_random,
            ndim=4 if has_square else None,
        )
        carry = images, filled(images, 0, bool)

        def judge(images: Array, key: Array) -> Array:
            options = {"key": key} if self.is_random else {}
            return logits_fn(images, **options)

        logits = judge(images, key)
        warn_of_probabilities(seen(normalized(logits)))
        num_classes = logits.shape[-1]
        for number, member in enumerate(self.members):
            own_key = draws.fold_in(key, number)

            def pursue(
                part: Array,
                carry: tuple[Array, Array],
                member: Member = member,
                key: Array = own_key,
            ) -> tuple[Array, Array]:
                # A broken example stays broken, whatever random logits say later.
                found, done = carry
                part_key, judge_key = draws.split(draws.fold_in(key, part))
                attacked = member.part(logits_fn, found, labels, part, key=part_key)
                broken = misclassified(judge(attacked, judge_key), labels)
                return select(broken & ~done, attacked, found), done | broken

            num_parts = member.num_parts(num_classes)
            carry = jax.lax.fori_loop(0, num_parts, pursue, carry)
        return jax.lax.stop_gradient(carry[0])


def autoattack(
    ball: Ball,
    *,
    version: str = "standard",
    members: Sequence[str] = (),
    box: tuple[float, float] = (0.0, 1.0),
) -> AutoAttack:
    """Builds the ensemble of Croce and Hein, without a step size to choose.

    | version | members, in this order |
    |---|---|
    | `standard` | `apgd-ce`, `apgd-t`, `fab-t`, `square` |
    | `rand` | `apgd-ce`, `apgd-dlr`, with gradients averaged over 20 draws |
    | `custom` | `members` |

    APGD takes 100 steps, `apgd-t` and `fab-t` go for the 9 likeliest wrong classes or
    all, Square asks 5000 queries; none restarts.

    Args:
      ball: the allowed perturbations, from `linf` or `l2`, of one radius: a float.
      version: `standard`; `rand`, for classifiers with random logits, which are called
        as `logits_fn(images, key=key)`; or `custom`.
      members: names out of `MEMBERS`, for `custom` alone.
      box: the range of pixel values.

    Returns:
      An `Attack`, whose `members` can also be called one by one. **Guarantees.** Shape
      and dtype are kept. An example is broken if one of the members breaks it: the
      result is then what the first of them found, in ball and box; else the image, as
      for misclassified images. Radius 0 changes nothing. With random logits each member
      draws and judges with new logits: what breaks now may be right at the next look.
      Probabilities instead of logits draw a warning, unless `jax.jit` hides them.

    Raises:
      ValueError: for other versions or members, and as `pgd` does; when called, with
        `square` among the members, also unless images are [B, H, W, C].

    Reference: Croce and Hein (2020), arXiv 2003.01690, Algorithm 2 and Section 5. *Our
    deviation*: with 3 classes, too few for the targeted DLR loss, `apgd-t` is one run
    on the DLR loss, with 2 on the margin (so is `apgd-dlr`), where their code fails.

    >>> import jax.numpy as jnp
    >>> from samrobust.attacks import linf
    >>> attack = autoattack(linf(0.1), version="custom", members=["apgd-ce"])
    >>> adversarial = attack(
    ...     lambda x: x, jnp.array([[0.6, 0.5], [0.9, 0.2]]), jnp.array([0, 0]),
    ...     key=jax.random.key(0))
    >>> jnp.argmax(adversarial, -1)
    Array([1, 0], dtype=int32)
    """
    box = check_set(ball, box)
    check(
        isinstance(ball.radius, float),
        "one radius that is known, for all examples",
        "Its members, `apgd`, `fab_targeted` and `square`, take radii [B].",
        radius=ball.radius,
    )
    check_choice(VERSIONS, version=version)
    check(not isinstance(members, str), "a list of members", members=members)
    check(
        bool(members) == (version == "custom"),
        "members for version=custom and for no other",
        f"Known members: {', '.join(MEMBERS)}.",
        version=version,
        members=tuple(members),
    )
    for name in members:
        check_choice(MEMBERS, members=name)
    check(
        len(set(members)) == len(members),
        "each member once",
        members=tuple(members),
    )
    if ball.order == 2:
        floored = l2(ball.radius, gradient_floor=_NORM_FLOOR)
        ball = ball._replace(steepest_ascent=floored.steepest_ascent)
    names = tuple(members) or _VERSIONS[version]
    eot = _DRAWS if version == "rand" else 1
    made = tuple(_MAKERS[name](name, ball, eot, box) for name in names)
    return AutoAttack(made, float(ball.radius), eot > 1, box, ball.order)


def _whole(attack: Attack) -> Callable[..., Array]:
    """Makes an attack the only part of a member."""

    def part(
        logits_fn: LogitsFn, images: Array, labels: Array, number: Array, *, key: Array
    ) -> Array:
        del number
        return attack(logits_fn, images, labels, key=key)

    return part


def _single(num_classes: int) -> int:
    del num_classes
    return 1


def _targets(num_classes: int) -> int:
    return max(1, min(_NUM_TARGETS, num_classes - 1))


_Box = tuple[float, float]


def _apgd_ce(name: str, ball: Ball, eot: int, box: _Box) -> Member:
    part = _whole(apgd(ball, eot=eot, box=box))
    return Member(name, _single, part, 300 * eot)


def _ratio_or_margin(logits: Array, labels: Array) -> Array:
    loss = dlr if logits.shape[-1] >= 3 else margin
    return loss(logits, labels)


def _apgd_dlr(name: str, ball: Ball, eot: int, box: _Box) -> Member:
    part = _whole(apgd(ball, loss=_ratio_or_margin, eot=eot, box=box))
    return Member(name, _single, part, 300 * eot)


def _apgd_t(name: str, ball: Ball, eot: int, box: _Box) -> Member:
    without_targets = apgd(ball, loss=_ratio_or_margin, eot=eot, box=box)

    def num_parts(num_classes: int) -> int:
        return _targets(num_classes) if num_classes >= 4 else 1

    def part(
        logits_fn: LogitsFn, images: Array, labels: Array, number: Array, *, key: Array
    ) -> Array:
        attack: Attack = without_targets
        call = accept(logits_fn, images, labels, key, box=box)
        if jax.eval_shape(call.logits_fn, call.images).shape[-1] >= 4:
            attack = apgd_targeted(
                ball, num_targets=1, first_target=number, eot=eot, box=box
            )
        return attack(*call[:3], key=call.key)

    return Member(name, num_parts, part, 300 * eot)


def _fab_t(name: str, ball: Ball, eot: int, box: _Box) -> Member:
    del eot

    def part(
        logits_fn: LogitsFn, images: Array, labels: Array, number: Array, *, key: Array
    ) -> Array:
        attack = fab_targeted(ball, num_targets=1, first_target=number, box=box)
        return attack(logits_fn, images, labels, key=key)

    return Member(name, _targets, part, 400)


def _square(name: str, ball: Ball, eot: int, box: _Box) -> Member:
    del eot
    return Member(name, _single, _whole(square(ball, box=box)), 5000)


_MAKERS: dict[str, Callable[[str, Ball, int, _Box], Member]] = {
    "apgd-ce": _apgd_ce,
    "apgd-t": _apgd_t,
    "fab-t": _fab_t,
    "square": _square,
    "apgd-dlr": _apgd_dlr,
}
_VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
MEMBERS = tuple(_MAKERS)
VERSIONS = (*_VERSIONS, "custom")
