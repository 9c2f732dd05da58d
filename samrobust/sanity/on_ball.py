"""The checks on the attack within one ball."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from samrobust import attacks
from samrobust.attacks import Ball
from samrobust.sanity import network_verdicts, verdicts
from samrobust.sanity.attacked import (
    Craft,
    measure_crafts,
    measure_steps,
    rescaled_cross_entropy,
)
from samrobust.sanity.finding import Finding
from samrobust.sanity.look import Look
from samrobust.sanity.network import count_products, float32_copy, measure_logits
from samrobust.types import Attack, LossFn

__all__ = ["ball_findings", "num_ball_measures"]


def num_ball_measures(look_has_transfer: bool, has_copy: bool) -> int:
    """How often `ball_findings` measures."""
    return 6 + look_has_transfer + 2 * has_copy


def ball_findings(look: Look, name: str, ball: Ball) -> list[Finding]:
    """All checks on one ball; `name` is its own."""
    images = look.measure(measure_logits(look.model))
    pgd = _pgd(look, ball)
    crafts = {
        "apgd": attacks.apgd(ball, num_steps=look.effort.apgd_steps),
        "apgd dlr": attacks.apgd(
            ball, loss=_scale_free(images["logits"]), num_steps=look.effort.apgd_steps
        ),
        "pgd": pgd,
        "rescaled": _pgd(look, ball, rescaled_cross_entropy),
        "noise": attacks.noise(ball, num_draws=look.effort.draws),
        "natural": attacks.identity,
    }
    outcome = _attacked(look, crafts)
    white_box = outcome["apgd"] & outcome["apgd dlr"]
    white_margin = np.maximum(outcome["apgd margin"], outcome["apgd dlr margin"])
    margins = white_margin, outcome["noise margin"]
    queries = look.effort.queries
    square = _attacked(look, {"square": attacks.square(ball, num_queries=queries)})
    findings = [
        _steps(look, ball),
        _restarts(look, ball),
        _radii(look, ball),
        verdicts.judge_square(white_box, square["square"], queries),
        _transfer(look, ball, white_box),
        verdicts.judge_logit_scale(
            outcome["pgd"], outcome["rescaled"], outcome["natural margin"]
        ),
        _precision(look, images["logits"], outcome["pgd"], pgd),
        verdicts.judge_noise(white_box, outcome["noise"], margins, look.effort.draws),
        verdicts.judge_finite({name: outcome[f"{name} finite"] for name in crafts}),
    ]
    return [dataclasses.replace(finding, ball=name) for finding in findings]


def _pgd(look: Look, ball: Ball, loss: LossFn = attacks.cross_entropy) -> Attack:
    return attacks.pgd(
        ball,
        step_size=ball.radius / 4,
        num_steps=look.effort.restart_steps,
        loss=loss,
        judge="any",
    )


def _scale_free(logits: np.ndarray) -> LossFn:
    """A loss that a factor of the logits does not change the ascent of."""
    return attacks.dlr if logits.shape[-1] >= 3 else attacks.margin


def _attacked(look: Look, by_name: dict[str, Attack]) -> dict[str, np.ndarray]:
    """The network on images of its own making."""
    crafts = {name: Craft(attack, look.model) for name, attack in by_name.items()}
    return look.measure(measure_crafts(look.model, crafts), {"": look.variables})


def _steps(look: Look, ball: Ball) -> Finding:
    stages = look.effort.steps
    outcome = look.measure(measure_steps(look.model, ball, stages, 1))
    return verdicts.judge_steps(
        stages, outcome["standing"][:, 0], outcome["margin"][:, 0]
    )


def _restarts(look: Look, ball: Ball) -> Finding:
    numbers, steps = look.effort.restarts, (look.effort.restart_steps,)
    outcome = look.measure(measure_steps(look.model, ball, steps, numbers[-1]))
    after_each = np.logical_and.accumulate(outcome["standing"][:, :, 0], axis=1)
    return verdicts.judge_restarts(numbers, after_each[:, np.array(numbers) - 1])


def _radii(look: Look, ball: Ball) -> Finding:
    """Radii up to where the ball around any image of the box is the whole box."""
    is_linf = math.isinf(ball.order)
    whole = 1.0 if is_linf else math.sqrt(math.prod(look.split.images.shape[1:]))
    start = min(ball.radius, whole / 2)
    radii = [float(r) for r in np.geomspace(start, whole, look.effort.radii)]
    make = attacks.linf if is_linf else attacks.l2
    steps = look.effort.restart_steps
    grid = {f"{r}": attacks.apgd(make(r), num_steps=steps) for r in radii}
    outcome = _attacked(look, grid)
    return verdicts.judge_radii({255 * r: outcome[f"{r}"] for r in radii})


def _transfer(look: Look, ball: Ball, white_box: np.ndarray) -> Finding:
    if not look.transfer:
        return verdicts.judge_transfer(white_box, {})
    attack = attacks.apgd(ball, num_steps=look.effort.apgd_steps)
    crafts, variables = {}, {"": look.variables}
    for name, surrogate in look.transfer.items():
        crafts[name] = Craft(attack, surrogate.model, name)
        variables[name] = surrogate.variables
    outcome = look.measure(measure_crafts(look.model, crafts), variables)
    return verdicts.judge_transfer(white_box, {name: outcome[name] for name in crafts})


def _precision(look: Look, logits: np.ndarray, own: np.ndarray, pgd: Attack) -> Finding:
    dtype = str(jnp.dtype(getattr(look.model, "dtype", None) or jnp.float32))
    shape = look.split.images.shape[1:]
    products = count_products(look.model, look.variables, shape)
    copy = float32_copy(look.model)
    if copy is None:
        return network_verdicts.judge_precision(dtype, products)
    exact_logits = look.measure(measure_logits(copy))["logits"]
    crafts = {"exact": Craft(pgd, copy)}
    outcome = look.measure(measure_crafts(look.model, crafts), {"": look.variables})
    return network_verdicts.judge_precision(
        dtype, products, (logits, exact_logits), (own, outcome["exact"])
    )
