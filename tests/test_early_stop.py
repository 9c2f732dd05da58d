"""Evaluation that leaves broken examples behind, against the one that does not."""

from typing import Any

import helpers
import jax
import numpy as np
import pytest

from samrobust.attacks import identity, l2, linf, margin, pgd, staged_pgd
from samrobust.evaluation import make_early_stop_evaluator, make_evaluator

BALLS: dict[str, Any] = {
    "linf": (linf(2 / 255), {"step_size": 0.5 / 255}),
    "l2": (l2(16 / 255), {"step_size": 4 / 255}),
}


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
    with helpers.quick_compilation():
        yield


def predict(model, variables, split):
    """The network's own labels, int32 [N]."""
    pixels = split.images.astype(np.float32) / np.float32(255)
    logits: Any = model.apply(variables, pixels, train=False)
    return np.argmax(logits, axis=-1).astype(np.int32)


def undecided_network(split):
    """A network whose logits are 0 on average over a split: small changes matter."""
    model, variables = helpers.make_network(width=8)
    pixels = split.images.astype(np.float32) / np.float32(255)
    logits: Any = model.apply(variables, pixels, train=False)
    variables["params"]["head"]["bias"] -= logits.mean(axis=0)
    return model, variables


def evaluate_both(network, split, options, *, batch_size):
    """Outcomes without and with early stopping, under the same key."""
    model, variables = network
    key = jax.random.key(3)
    attacks, stages = {"natural": identity}, {}
    for name, (ball, step) in BALLS.items():
        attacks[name] = pgd(ball, judge="any", **step, **options)
        stages[name] = staged_pgd(ball, **step, **options)
    plain = make_evaluator(model, attacks, batch_size=batch_size)
    early = make_early_stop_evaluator(model, stages, batch_size=batch_size)
    return plain(variables, split, key).correct, early(variables, split, key).correct


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
    """Labels the network gives itself, so that some survive and some do not."""
    split = helpers.make_split(50)
    model, variables = network = undecided_network(split)
    split = type(split)(split.images, predict(model, variables, split))
    plain, early = evaluate_both(network, split, options, batch_size=batch_size)
    assert list(early) == list(plain)
    assert plain["natural"].all()
    for name, correct in plain.items():
        np.testing.assert_array_equal(early[name], correct, err_msg=name)
    if options["num_steps"] > 1:
        survivors = np.concatenate([plain[name] for name in BALLS])
        assert 0 < survivors.mean() < 1


def test_when_all_are_broken_at_once_nothing_more_is_computed():
    network = helpers.make_network()
    model, variables = network
    split = helpers.make_split(20)
    wrong = (predict(model, variables, split) + 1) % 10
    split = type(split)(split.images, wrong)
    steps = []
    stages = staged_pgd(linf(1 / 255), step_size=1 / 255, num_steps=50, restarts=4)

    def advance(*arguments):
        jax.debug.callback(lambda n: steps.append(int(n)), arguments[-1])
        return stages.advance(*arguments)

    evaluate = make_early_stop_evaluator(
        model, {"linf": stages._replace(advance=advance)}, batch_size=20
    )
    outcome = evaluate(variables, split, jax.random.key(0))
    jax.effects_barrier()
    assert not outcome.correct["linf"].any()
    assert steps == [1]


def test_progress_ends_at_the_last_example_and_never_goes_back():
    model, variables = helpers.make_network()
    stages = {
        name: staged_pgd(ball, num_steps=3, **step)
        for name, (ball, step) in BALLS.items()
    }
    evaluate = make_early_stop_evaluator(model, stages, batch_size=8)
    seen = []
    split = helpers.make_split(20)
    evaluate(variables, split, jax.random.key(0), on_batch=lambda *x: seen.append(x))
    shares = [done for done, *_ in seen]
    assert shares == sorted(shares)
    assert seen[0] == (0, 20, "natural")
    assert seen[-1] == (20, 20, "done")
    assert any(doing.startswith("l2: step 3/3, ") for _, _, doing in seen)


def test_progress_is_told_after_every_batch():
    model, variables = helpers.make_network()
    stages = {"linf": staged_pgd(linf(0.0), step_size=1, num_steps=3)}  # none breaks
    evaluate = make_early_stop_evaluator(model, stages, batch_size=8)
    split = helpers.make_split(24)
    split = type(split)(split.images, predict(model, variables, split))
    seen = []
    evaluate(variables, split, jax.random.key(0), on_batch=lambda *x: seen.append(x[0]))
    # Three batches of one step, which cost 5 passes, and three of two, which cost 8.
    assert sorted({*seen}) == [0, 3, 6, 9, 14, 19, 23, 24]


def test_the_stages_refuse_what_the_attack_refuses():
    with pytest.raises(ValueError, match="restarts >= 1, got restarts=0"):
        staged_pgd(linf(0.1), step_size=0.1, num_steps=1, restarts=0)


def test_early_stop_needs_the_any_judge():
    with pytest.raises(ValueError, match=r"evaluation\.judge=any with"):
        helpers.make_config("st", {"evaluation.early_stop": True})
