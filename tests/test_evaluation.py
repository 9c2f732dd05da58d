"""Accuracy under attack: every example once, whatever the batch; `evaluate`."""

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import helpers
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import strategies as st

from samrobust import cli
from samrobust.attacks import (
    AutoAttack,
    Member,
    StagedPgd,
    identity,
    l2,
    linf,
    pgd,
    staged_pgd,
)
from samrobust.cli import evaluate as command
from samrobust.data import Split
from samrobust.evaluation import (
    Archive,
    Outcome,
    make_autoattack_evaluator,
    make_evaluator,
    make_skip_broken_evaluator,
    measure,
)
from samrobust.experiments.networks import load_network
from samrobust.experiments.run import run
from samrobust.experiments.workdir import settle_config
from samrobust.system.claims.lease import claim
from samrobust.system.files import read_sealed

KEY = jax.random.key(3)
NUM_EXAMPLES = 23


@functools.cache
def network() -> tuple[Any, Any, Split]:
    """A network, untrained, and a split that it classifies half rightly."""
    model, variables = helpers.make_network()
    split = helpers.make_split(NUM_EXAMPLES)
    predictions = [predict(model, variables, image) for image in split.images]
    keep = np.arange(NUM_EXAMPLES) % 2 == 0
    labels = np.where(keep, predictions, (np.array(predictions) + 1) % 10)
    return model, variables, Split(split.images, labels.astype(np.int32))


@functools.cache
def predictor(model):
    return jax.jit(
        lambda variables, images: jnp.argmax(
            model.apply(variables, images, train=False), axis=-1
        )
    )


def predict(model, variables, image) -> int:
    pixels = image[None].astype(np.float32) / np.float32(255)
    return int(predictor(model)(variables, pixels)[0])


@functools.cache
def evaluate(batch_size: int = NUM_EXAMPLES, *, random_start=False):
    """The outcome of several attacks on the untrained network."""
    model, variables, split = network()
    attacks = {
        "natural": identity,
        "radius 0": pgd(linf(0.0), step_size=0.1, num_steps=3),
        "linf": pgd(linf(0.1), step_size=0.03, num_steps=2, random_start=random_start),
        "any": pgd(
            l2(0.5), step_size=0.2, num_steps=2, random_start=random_start, judge="any"
        ),
    }
    evaluator = make_evaluator(model, attacks, batch_size=batch_size)
    return evaluator(variables, split, KEY).correct


# The evaluator.


@functools.cache
def evaluate_natural(batch_size: int) -> np.ndarray:
    model, variables, split = network()
    evaluator = make_evaluator(model, {"natural": identity}, batch_size=batch_size)
    return evaluator(variables, split, KEY).correct["natural"]


@pytest.mark.parametrize("batch_size", [1, 7, NUM_EXAMPLES, 64])
def test_natural_accuracy_is_that_of_a_plain_loop_whatever_the_batch(batch_size):
    model, variables, split = network()
    expected = [
        predict(model, variables, image) == label
        for image, label in zip(split.images, split.labels, strict=True)
    ]
    correct = evaluate_natural(batch_size)
    assert correct.dtype == bool
    assert correct.tolist() == expected
    assert expected == [i % 2 == 0 for i in range(NUM_EXAMPLES)]


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(0, 300), st.integers(1, 99))
def test_batches_of_one_size_visit_every_example_exactly_once(num_examples, size):
    positions, visited, padding = 3 * np.arange(num_examples), [], 0
    for indices, count in measure.packed(positions, size):
        assert len(indices) == size
        assert indices.dtype == np.int32
        assert set(indices) == set(indices[:count])
        visited.extend(indices[:count].tolist())
        padding += len(indices) - count
    assert visited == positions.tolist()
    assert padding < size


def test_without_a_random_start_attacks_do_not_depend_on_the_batch():
    for name, correct in evaluate(7).items():
        assert correct.tolist() == evaluate()[name].tolist()


@pytest.mark.parametrize("batch_size", [1, 7, NUM_EXAMPLES, 64])
def test_every_example_is_reported_once(batch_size, monkeypatch):
    monkeypatch.setattr(measure, "_SECONDS_UNTOLD", 1e9)
    model, variables, split = network()
    reports = []
    make_evaluator(model, {"natural": identity}, batch_size=batch_size)(
        variables,
        split,
        KEY,
        on_batch=lambda done, total, _="": reports.append((done, total)),
    )
    sizes = np.diff([0, *(done for done, _ in reports)])
    assert sizes.sum() == NUM_EXAMPLES
    assert sizes.max() == min(batch_size, NUM_EXAMPLES)
    assert {total for _, total in reports} == {NUM_EXAMPLES}


def test_radius_zero_is_natural_accuracy():
    outcome = evaluate()
    np.testing.assert_array_equal(outcome["radius 0"], outcome["natural"])


def test_a_random_start_judged_at_any_iterate_never_helps_the_network():
    """Not a theorem, for the image itself is not among the iterates: an example that
    is misclassified may become classified. So of those classified rightly only."""
    outcome = evaluate(random_start=True)
    for name in ("linf", "any"):
        assert outcome[name].sum() <= outcome["natural"].sum()


def test_the_same_key_gives_the_same_outcome():
    model, variables, split = network()
    attack = pgd(linf(0.05), step_size=0.05, num_steps=0)  # a random point of the ball
    evaluator = make_evaluator(model, {"noise": attack}, batch_size=NUM_EXAMPLES)
    one, again = [
        evaluator(variables, split, jax.random.key(s)).correct["noise"] for s in (1, 1)
    ]
    np.testing.assert_array_equal(one, again)


def test_the_network_is_judged_by_its_running_statistics():
    """Alone in its batch, an image is judged as among others."""
    model, variables, split = network()
    one = Split(split.images[4:5], split.labels[4:5])
    evaluator = make_evaluator(model, {"natural": identity}, batch_size=NUM_EXAMPLES)
    correct = evaluator(variables, one, KEY).correct["natural"]
    assert correct.tolist() == evaluate()["natural"][4:5].tolist()


def test_the_outcome_has_the_order_of_the_attacks():
    assert list(evaluate()) == ["natural", "radius 0", "linf", "any"]


def test_accuracies_are_percentages():
    correct = {"natural": np.array([True, True, True, False])}
    assert Outcome(correct, {}).accuracy == {"natural": 75.0}


def test_a_batch_of_no_examples_is_refused():
    model, _, _ = network()
    with pytest.raises(ValueError, match=r"Expected batch_size >= 0, got .*=-1\."):
        make_evaluator(model, {"natural": identity}, batch_size=-1)


def test_an_empty_split_is_refused():
    model, variables, split = network()
    empty = Split(split.images[:0], split.labels[:0])
    evaluator = make_evaluator(model, {"natural": identity}, batch_size=4)
    with pytest.raises(ValueError, match="Expected a split with examples"):
        evaluator(variables, empty, KEY)


def test_a_batch_is_no_larger_than_the_split():
    model, variables, split = network()
    sizes = []

    def watching(logits_fn, images, labels, *, key):
        sizes.append((len(images), key.shape))
        return identity(logits_fn, images, labels, key=key)

    evaluator = make_evaluator(model, {"natural": watching}, batch_size=500)
    evaluator(variables, split, KEY)
    assert {*sizes} == {(NUM_EXAMPLES, (NUM_EXAMPLES,))}


# Logits that are not finite.


class Brittle:
    """Bright images are of class 0, and very bright ones of none."""

    def apply(self, variables, images, train):
        del train
        bright = jnp.mean(images, axis=(1, 2, 3)) * variables["factor"]
        ceiling = jnp.sqrt(0.9 - bright)  # NaN beyond
        return jnp.stack([ceiling, 0 * bright], axis=-1)


BRITTLE: Any = Brittle()
SOUND = {"factor": jnp.float32(1.0)}
GRAY = Split(
    np.array([60, 100, 140, 200], np.uint8).reshape(4, 1, 1, 1), np.zeros(4, np.int32)
)


def brighten(logits_fn, images, labels, *, key):
    del logits_fn, labels, key
    return images + 0.4


def staged_brighten():
    def advance(logits_fn, current, images, labels, num_steps):
        del logits_fn, images, num_steps
        return current + 0.4, jnp.zeros(labels.shape, bool)

    def start(images, labels, restart, *, key):
        del labels, restart, key
        return images

    return StagedPgd(start, advance, 1, 1)


def brittle_evaluator(kind):
    if kind == "plain":
        attacks = {"natural": identity, "brighten": brighten}
        return make_evaluator(BRITTLE, attacks, batch_size=3)
    attacks = {"brighten": staged_brighten()}
    return make_skip_broken_evaluator(BRITTLE, attacks, batch_size=3)


@pytest.mark.parametrize("kind", ["plain", "early stop"])
def test_logits_that_are_not_finite_are_no_prediction_and_are_reported(kind):
    with pytest.warns(UserWarning, match=r"misclassified") as caught:
        outcome = brittle_evaluator(kind)(SOUND, GRAY, KEY)
    assert outcome.correct["natural"].tolist() == [True] * 4
    assert outcome.correct["brighten"].tolist() == [True, True, False, False]
    assert outcome.details == {"non_finite": {"brighten": 2}}
    assert str(caught[0].message) == (
        "The highest logit is NaN or infinite on adversarial images (2 under "
        "brighten). They count as misclassified."
    )


@pytest.mark.parametrize("kind", ["plain", "early stop"])
@pytest.mark.parametrize(("factor", "count"), [(1.2, 1), (np.nan, 4), (-np.inf, 4)])
def test_a_network_without_finite_logits_is_refused(kind, factor, count):
    message = f"Expected a network with finite logits, got images_without={count}, num"
    with pytest.raises(ValueError, match=message):
        brittle_evaluator(kind)({"factor": jnp.float32(factor)}, GRAY, KEY)


# One interface, whatever the attacks and the network.


class Linear(nn.Module):
    """A network without BatchNorm: its variables are `params` alone."""

    @nn.compact
    def __call__(self, images, *, train):
        del train
        return nn.Dense(2)(images.reshape(len(images), -1) - 0.5)


def test_all_evaluators_are_called_alike_and_agree_on_a_network_without_batch_norm(
    tmp_path,
):
    model, split = Linear(), helpers.make_split(9, side=4)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), train=False)
    assert variables.keys() == {"params"}
    split = Split(split.images, split.labels % 2)
    ball = linf(0.1)
    options: Any = {"step_size": 0.05, "num_steps": 2, "random_start": False}
    attack = pgd(ball, **options, judge="any")
    stages = staged_pgd(ball, **options)
    member = Member("pgd", lambda _: 1, lambda *a, key: attack(*a[:3], key=key), 6)
    ensemble = AutoAttack((member,), 0.1, False)
    evaluators = [
        make_evaluator(model, {"natural": identity, "a": attack}, batch_size=4),
        make_skip_broken_evaluator(model, {"a": stages}, batch_size=4),
        make_autoattack_evaluator(model, {"a": ensemble}, batch_size=4),
    ]
    told = []
    outcomes = [
        evaluate(
            *(variables, split, KEY),
            archive=Archive(tmp_path / "fates", provenance={"who": "a test"}),
            on_batch=lambda done, total, _="": told.append((done, total)),
        )
        for evaluate in evaluators
    ]
    natural = outcomes[0].correct["natural"]
    assert 0 < outcomes[0].accuracy["a"] < outcomes[0].accuracy["natural"] < 100
    for outcome in outcomes:
        assert list(outcome.correct) == ["natural", "a"]
        np.testing.assert_array_equal(outcome.correct["natural"], natural)
        # A wrong image may become right; for AutoAttack it is wrong for good.
        np.testing.assert_array_equal(
            outcome.correct["a"] & natural, outcomes[0].correct["a"] & natural
        )
        assert outcome.non_finite == {}
    assert told.count((9, 9)) == 3
    by = {"who": "a test"}
    assert [outcome.ended_by for outcome in outcomes] == [{}, {}, {"a": by}]
    (path,) = (tmp_path / "fates").iterdir()
    summary = outcomes[2].details["autoattack"]
    assert summary == {
        "after_each": {"a": {"pgd": outcomes[2].accuracy["a"]}},
        "outcome": {"a": f"fates/{path.name}"},
        "begun_by": {"a": by},
    }


# Precision, and what goes on while the device computes.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_product_is_asked_for_in_the_highest_precision(dtype):
    """Of the network and its gradient; a GPU else rounds float32 to TF32."""
    model, variables, split = network()
    model = model.clone(dtype=dtype)
    attack = pgd(linf(0.1), step_size=0.1, num_steps=1)

    def attacked(variables, images, labels, key):
        logits_fn = measure.classifier(model, variables)
        return attack(logits_fn, images, labels, key=key)

    program: Any = measure.jit_for_all(attacked)
    images = np.zeros((4, *split.images.shape[1:]), np.float32)
    text = program.lower(variables, images, split.labels[:4], KEY).as_text()
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)
    assert len(products) > 5
    assert [p for p in products if p.count("HIGHEST") != 2] == []


def test_a_caller_is_told_and_may_raise_while_the_device_computes(monkeypatch):
    monkeypatch.setattr(measure, "_SECONDS_UNTOLD", 0.01)

    @jax.jit
    def long(x):
        return jax.lax.fori_loop(0, 3000, lambda _, x: jnp.tanh(x @ x), x)

    told = []

    def tell(done, total):
        told.append((done, total))
        if len(told) == 3:
            raise KeyboardInterrupt

    matrix = jnp.eye(200)
    measure.fetch(jax.block_until_ready(long(matrix)), tell, 1, 2)
    assert told == []
    with pytest.raises(KeyboardInterrupt):
        measure.fetch(long(matrix), tell, 1, 2)
    assert told == [(1, 2)] * 3


# A trained network, and the command.

TRAINED = {
    "model.width": 8,
    "data.train_size": 640,
    "data.test_size": 150,
    "training.epochs": 12,
    "evaluation.linf": (16.0, 255.0),
    "evaluation.l2": (64.0,),
    "evaluation.num_steps": 4,
    "evaluation.batch_size": 64,
}


@functools.cache
def finished() -> tuple[Path, Any, Any, dict[str, Any]]:
    """A run of standard training that is worth attacking."""
    config = helpers.make_config("st", TRAINED)
    dataset = helpers.load_data(config)
    workdir = helpers.lasting_folder()
    return (
        workdir,
        config,
        dataset,
        run(config, workdir, helpers.Silent(), dataset=dataset),
    )


@pytest.fixture
def workdir(tmp_path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished()[0], tmp_path / "run"))


def evaluate_command(workdir: Path, capsys, *flags: str) -> dict[str, Any]:
    """What `samrobust evaluate` adds to evaluations.jsonl."""
    capsys.readouterr()
    assert helpers.main("evaluate", f"--workdir={workdir}", *flags) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    assert "Added to" in output
    return helpers.read_lines(workdir / "evaluations.jsonl")[-1]


def test_training_learns_digits_and_a_large_radius_undoes_it():
    accuracy = finished()[3]["accuracy"]
    assert accuracy.keys() == {*("natural", "linf 16/255", "linf 255/255", "l2 64/255")}
    assert accuracy["natural"] > 80
    assert accuracy["linf 16/255"] < accuracy["natural"]
    assert accuracy["l2 64/255"] < accuracy["natural"]
    assert accuracy["linf 255/255"] < 5


def test_the_result_says_what_was_measured():
    workdir, config, dataset, result = finished()
    assert result == read_sealed(workdir / "result.json")
    assert (result["dataset"], result["row"], result["seed"]) == ("digits", "st", 0)
    assert (result["label"], result["num_test"]) == ("ST", 150)
    assert result["provenance"].keys() >= {
        *("commit", "jax", "device", "command", "seconds")
    }
    variables = load_network(config, dataset, workdir, "last").variables
    natural = helpers.plain_accuracy(config, dataset, variables)
    assert result["accuracy"]["natural"] == pytest.approx(natural)


def test_evaluate_without_flags_reproduces_the_result(workdir, capsys):
    before = (workdir / "result.json").read_bytes()
    line = evaluate_command(workdir, capsys)
    assert line["accuracy"] == finished()[3]["accuracy"]
    assert (workdir / "result.json").read_bytes() == before


def test_evaluate_attacks_as_its_flags_say(workdir, capsys):
    result = finished()[3]["accuracy"]
    (workdir / "evaluations.jsonl").write_text('{"earlier": true}\n')
    line = evaluate_command(
        workdir,
        capsys,
        *("--norm=l2", "--epsilon=64", "--epsilon=96", "--num-steps=3"),
        *("--loss=margin", "--judge=any", "--batch-size=50", "--restarts=2"),
    )
    accuracy = line["accuracy"]
    assert accuracy.keys() == {"natural", "l2 64/255", "l2 96/255"}
    assert accuracy["natural"] == result["natural"]
    assert accuracy["l2 96/255"] < accuracy["l2 64/255"] < result["natural"]
    stated = {
        **{"num_steps": 3, "loss": "margin", "judge": "any", "batch_size": 50},
        **{"l2": [64.0, 96.0], "linf": [], "restarts": 2},
    }
    assert {name: line["evaluation"][name] for name in stated} == stated
    lines = helpers.read_lines(workdir / "evaluations.jsonl")
    assert lines == [{"earlier": True}, line]


def test_one_process_at_a_time_keeps_adversarial_images(workdir, capsys):
    flags = ("--attack=autoattack", "--save-examples", "--num-examples=8")
    with claim(workdir / "autoattack"):
        assert helpers.main("evaluate", f"--workdir={workdir}", *flags) == 69
    assert "Another process" in capsys.readouterr().err


def test_more_restarts_never_raise_the_accuracy():
    workdir, config, dataset, _ = finished()
    variables = load_network(config, dataset, workdir, "last").variables
    model = helpers.make_model(config, dataset)
    attacks = {
        str(restarts): pgd(
            linf(14 / 255), step_size=7 / 255, num_steps=1, restarts=restarts
        )
        for restarts in (1, 8)
    }
    sums = {}
    for name, attack in attacks.items():  # the key of a start is by the attack's name
        evaluator = make_evaluator(model, {"pgd": attack}, batch_size=150)
        sums[name] = evaluator(variables, dataset.test, KEY).correct["pgd"]
    assert not np.any(sums["8"] & ~sums["1"])
    assert sums["8"].sum() < sums["1"].sum()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epsilon=8"], "Expected one --norm with --epsilon"),
        (["--norm=linf", "--epsilon=300"], "Expected evaluation.linf <= 255"),
        (["--norm=l2", "--epsilon=5000"], "Expected evaluation.l2 <= 2040, the"),
        (["--restarts=0"], "--restarts: Expected 1 <= value"),
        (["--checkpoint=best"], "data.validation_size"),
        (["--config.seed=1"], "evaluate takes no --config"),
        (["--step-size=1"], "one --norm and one --epsilon"),
    ],
)
def test_flags_that_make_no_sense_are_refused_with_a_reason(
    workdir, flags, message, capsys
):
    assert helpers.main("evaluate", f"--workdir={workdir}", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (workdir / "evaluations.jsonl").exists()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_step_size_is_that_of_the_only_radius_there_is(norm, tmp_path):
    radii: dict[str, tuple[float, ...]] = {"evaluation.linf": (), "evaluation.l2": ()}
    config = helpers.make_config("st", radii | {f"evaluation.{norm}": (48.0,)})
    settle_config(tmp_path, config)
    flags = ["evaluate", f"--workdir={tmp_path}", "--step-size=3"]
    found = command._config(tmp_path, cli._parse(flags)).evaluation
    assert found[f"{norm}_step"] == 3 / 48
    (other,) = {"linf", "l2"} - {norm}
    assert found[f"{other}_step"] == config.evaluation[f"{other}_step"]


def test_evaluating_what_was_never_trained_is_refused(tmp_path, capsys):
    assert helpers.main("evaluate", f"--workdir={tmp_path}") == 2
    assert "Train it first" in capsys.readouterr().err
