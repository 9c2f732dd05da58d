"""Evaluation that leaves broken examples behind, against the one that does not."""

from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samrobust.attacks import identity, l2, linf, margin, pgd, staged_pgd
from samrobust.evaluation import make_evaluator, make_skip_broken_evaluator

BALLS: dict[str, Any] = {
    "linf": (linf(0.05), {"step_size": 0.0125}),
    "l2": (l2(0.2), {"step_size": 0.05}),
}


class Bent:
    """A small network that bends; some examples survive an attack, some do not."""

    def apply(self, variables, images, train):
        assert not train
        first, second = variables["params"]
        return jnp.tanh((images.reshape(len(images), -1) - 0.5) @ first) @ second


MODEL: Any = Bent()
_RNG = np.random.default_rng(5)
VARIABLES = {
    "params": [
        jnp.asarray(_RNG.standard_normal(shape) / 2, jnp.float32)
        for shape in ((16, 12), (12, 5))
    ]
}


def make_split(num_examples):
    """Images with the network's own labels."""
    images = helpers.make_split(num_examples, side=4).images
    logits = MODEL.apply(VARIABLES, images / np.float32(255), train=False)
    return helpers.Split(images, np.argmax(logits, axis=-1).astype(np.int32))


def evaluate_both(split, options, *, batch_size):
    """What stands without and with early stopping, under the same key."""
    key = jax.random.key(3)
    attacks, stages = {"natural": identity}, {}
    for name, (ball, step) in BALLS.items():
        attacks[name] = pgd(ball, judge="any", **step, **options)
        stages[name] = staged_pgd(ball, **step, **options)
    plain = make_evaluator(MODEL, attacks, batch_size=batch_size)
    early = make_skip_broken_evaluator(MODEL, stages, batch_size=batch_size)
    return [each(VARIABLES, split, key).correct for each in (plain, early)]


@pytest.mark.parametrize(
    ("options", "batch_size"),
    [
        ({"num_steps": 10}, 16),
        ({"num_steps": 4, "restarts": 3, "loss": margin}, 50),
        ({"num_steps": 1, "random_start": False}, 64),
        ({"num_steps": 0}, 7),
    ],
)
def test_every_example_has_the_outcome_of_the_plain_evaluation(options, batch_size):
    plain, early = evaluate_both(make_split(50), options, batch_size=batch_size)
    assert list(early) == list(plain)
    assert plain["natural"].all()
    for name, correct in plain.items():
        np.testing.assert_array_equal(early[name], correct, err_msg=name)
    if options["num_steps"] > 1:
        survivors = np.concatenate([plain[name] for name in BALLS])
        assert 0 < survivors.mean() < 1


def test_what_a_network_says_beyond_the_first_mistake_is_not_looked_at():
    class Bursting:
        """Mistaken for bright images; of brighter ones it has no logits."""

        def apply(self, variables, images, train):
            assert not train
            bright = jnp.mean(images, (1, 2, 3))
            logits = jnp.stack([variables["params"] - bright, 0 * bright], -1)
            return jnp.where(bright[:, None] > 0.31, jnp.nan, logits)

    model: Any = Bursting()
    variables = {"params": jnp.float32(0.3)}
    images = np.full([3, 2, 2, 1], 74, np.uint8)  # 0.290, and 0.317 in the end
    split = helpers.Split(images, np.zeros(3, np.int32))
    options: Any = {"step_size": 0.003, "num_steps": 9, "random_start": False}
    attacks = {"natural": identity, "linf": pgd(linf(0.05), judge="any", **options)}
    stages = {"linf": staged_pgd(linf(0.05), **options)}
    for evaluate in (
        make_evaluator(model, attacks, batch_size=3),
        make_skip_broken_evaluator(model, stages, batch_size=3),
    ):
        outcome = evaluate(variables, split, jax.random.key(0))
        assert not outcome.correct["linf"].any()
        assert outcome.non_finite == {}


def test_when_all_are_broken_at_once_nothing_more_is_computed():
    split, steps = make_split(20), []
    split = type(split)(split.images, (split.labels + 1) % 5)
    stages = staged_pgd(linf(1 / 255), step_size=1 / 255, num_steps=50, restarts=4)

    def advance(*arguments):
        jax.debug.callback(lambda n: steps.append(int(n)), arguments[-1])
        return stages.advance(*arguments)

    evaluate = make_skip_broken_evaluator(
        MODEL, {"linf": stages._replace(advance=advance)}, batch_size=20
    )
    outcome = evaluate(VARIABLES, split, jax.random.key(0))
    jax.effects_barrier()
    assert not outcome.correct["linf"].any()
    assert steps == [1]


def progress(stages, split):
    """What is told of an evaluation."""
    told = []
    evaluate = make_skip_broken_evaluator(MODEL, stages, batch_size=8)
    key = jax.random.key(0)
    evaluate(VARIABLES, split, key, on_batch=lambda *report: told.append(report))
    return told


def test_progress_ends_at_the_last_example_and_never_goes_back():
    stages = {
        name: staged_pgd(ball, num_steps=3, restarts=2, **step)
        for name, (ball, step) in BALLS.items()
    }
    told = progress(stages, make_split(20))
    shares = [done for done, *_ in told]
    assert shares == sorted(shares)
    assert told[0] == (0, 20, "natural")
    assert told[-1] == (20, 20, "done")
    last = "l2: step 3/3 of restart 2/2, "
    assert any(doing.startswith(last) for _, _, doing in told)


def test_progress_is_told_after_every_batch_by_the_passes_it_took():
    stages = {"linf": staged_pgd(linf(0.0), step_size=1, num_steps=3)}  # none breaks
    shares = {done for done, *_ in progress(stages, make_split(24))}
    # Three batches of one step, which cost 5 passes, and three of two, which cost 8.
    assert sorted(shares) == [0, 3, 6, 9, 14, 19, 23, 24]


def test_the_stages_refuse_what_the_attack_refuses():
    with pytest.raises(ValueError, match="restarts >= 1, got restarts=0"):
        staged_pgd(linf(0.1), step_size=0.1, num_steps=1, restarts=0)


def test_early_stop_needs_the_any_judge():
    with pytest.raises(ValueError, match=r"evaluation\.judge=any with"):
        helpers.make_config("st", {"evaluation.early_stop": True})
