"""AutoAttack: the ensemble as a function, and over a split with its survivors."""

import dataclasses
import functools
import json
import shutil
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samrobust import validation
from samrobust.attacks import (
    MEMBERS,
    VERSIONS,
    AutoAttack,
    Member,
    autoattack,
    l2,
    linf,
)
from samrobust.evaluation import make_autoattack_evaluator

KEY = jax.random.key(5)
RADII = {"linf": linf(0.05), "l2": l2(0.2)}


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
    with helpers.quick_compilation():
        yield


def make_problem(num_classes=5, num_images=24):
    """A small random network that bends, and images at all distances from its edges."""
    rng = np.random.default_rng(num_classes)
    w1 = jnp.asarray(rng.standard_normal((16, 12)) / 2, jnp.float32)
    w2 = jnp.asarray(rng.standard_normal((12, num_classes)), jnp.float32)
    images = jnp.asarray(rng.uniform(size=(num_images, 4, 4, 1)), jnp.float32)

    def logits_fn(images, *, key=None):
        logits = jnp.tanh((images.reshape(len(images), -1) - 0.5) @ w1) @ w2
        if key is None:
            return logits
        return logits + 0.01 * jax.random.normal(key, logits.shape)

    labels = jnp.argmax(logits_fn(images), axis=-1).astype(jnp.int32)
    return logits_fn, images, labels.at[0].set((labels[0] + 1) % num_classes)


@functools.cache
def attacked(norm, **options):
    logits_fn, images, labels = make_problem()
    attack = autoattack(RADII[norm], **options)
    result = jax.jit(functools.partial(attack, logits_fn))(images, labels, key=KEY)
    return np.asarray(result), np.asarray(jnp.argmax(logits_fn(result), -1) == labels)


@pytest.mark.parametrize("norm", list(RADII))
def test_the_ensemble_breaks_whatever_a_member_breaks(norm):
    _, standing = attacked(norm)
    assert 0.1 < standing.mean() < 0.9
    assert not standing[0]  # misclassified as it is
    for member in ("apgd-ce", "square"):
        _, alone = attacked(norm, version="custom", members=(member,))
        assert np.all(standing <= alone)


@pytest.mark.parametrize("norm", list(RADII))
def test_what_it_hands_in_lies_in_the_ball_and_what_stands_is_unchanged(norm):
    _, images, _ = make_problem()
    result, standing = attacked(norm)
    assert result.min() >= 0
    assert result.max() <= 1
    distances = np.asarray(RADII[norm].norm(jnp.asarray(result) - images))
    assert np.all(distances <= RADII[norm].radius * (1 + 1e-5))
    assert np.all(distances[standing] == 0)
    assert distances[0] == 0
    assert np.all(distances[1:][~standing[1:]] > 0)


def test_without_a_radius_nothing_changes_and_with_a_large_one_nothing_stands():
    logits_fn, images, labels = make_problem()
    unchanged = autoattack(linf(0.0))(logits_fn, images, labels, key=KEY)
    np.testing.assert_array_equal(unchanged, images)
    broken = autoattack(linf(1.0), version="custom", members=["apgd-ce"])(
        logits_fn, images, labels, key=KEY
    )
    assert not np.any(jnp.argmax(logits_fn(broken), -1) == labels)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_few_classes_leave_fewer_targets_and_another_loss(num_classes):
    logits_fn, images, labels = make_problem(num_classes, num_images=16)
    attack = autoattack(linf(0.03), version="custom", members=["apgd-t", "fab-t"])
    parts = [member.num_parts(num_classes) for member in attack.members]
    assert parts == [1, num_classes - 1]
    result = attack(logits_fn, images, labels, key=KEY)
    standing = np.asarray(jnp.argmax(logits_fn(result), -1) == labels)
    assert 0 < standing.mean() < 1


def test_a_random_classifier_is_attacked_over_its_draws():
    logits_fn, images, labels = make_problem(num_images=4)
    attack = autoattack(linf(0.1), version="rand")
    assert [member.name for member in attack.members] == ["apgd-ce", "apgd-dlr"]

    def noisy(images, *, key):  # a key must be given
        return logits_fn(images, key=key)

    result = attack(noisy, images, labels, key=KEY)
    standing = np.asarray(jnp.argmax(logits_fn(result), -1) == labels)
    assert standing.mean() < 0.8


@pytest.mark.parametrize("norm", list(RADII))
def test_what_was_broken_stays_as_it_was_though_the_next_look_finds_it_right(norm):
    logits_fn, images, labels = make_problem()
    labels = jnp.argmax(logits_fn(images), axis=-1)

    def noisy(images, *, key):
        logits = logits_fn(images)
        return logits + jax.random.normal(key, logits.shape)

    attack = autoattack(RADII[norm], version="rand")
    first = dataclasses.replace(attack, members=attack.members[:1])
    both = attack(noisy, images, labels, key=KEY)
    alone = np.asarray(first(noisy, images, labels, key=KEY))
    assert np.all(RADII[norm].norm(both - images) <= RADII[norm].radius * (1 + 1e-5))
    moved = np.any(alone != np.asarray(images), axis=(1, 2, 3))
    assert moved.any()
    np.testing.assert_array_equal(np.asarray(both)[moved], alone[moved])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "plus"}, r"Expected version in \{standard, rand, custom\}, got"),
        ({"version": "custom"}, "members for version=custom"),
        ({"members": ["square"]}, "members for version=custom"),
        ({"version": "custom", "members": ["pgd"]}, "got members='pgd'"),
        ({"version": "custom", "members": ["square"] * 2}, "each member once"),
    ],
)
def test_what_it_cannot_mean_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        autoattack(linf(0.1), **options)


def test_the_config_knows_the_same_names():
    assert validation._VERSIONS == VERSIONS
    assert validation._MEMBERS == MEMBERS


# Over a split


def toy(name, broken_share, num_parts=1):
    """A member that breaks an example where a coin says so."""

    def part(_, images, labels, number, *, key):
        drawn = jax.random.uniform(jax.random.fold_in(key, number), labels.shape)
        inverted = jnp.where(images.mean((1, 2, 3), keepdims=True) > 0.5, 0.0, 1.0)
        coin = (drawn < broken_share)[:, None, None, None]
        return jnp.where(coin, jnp.broadcast_to(inverted, images.shape), images)

    return Member(name, lambda _: num_parts, part, 1)


class Brightness:
    """A network in so far as the evaluation needs one: bright or dark."""

    def apply(self, variables, images, train):
        assert not train
        bright = images.mean((1, 2, 3)) - variables["threshold"]
        return jnp.stack([-bright, bright], axis=-1)


NETWORK: Any = Brightness()
TOYS = {
    "one": AutoAttack((toy("first", 0.2, 3), toy("second", 0.5)), 0.1, False),
    "two": AutoAttack((toy("first", 0.1),), 0.2, False),
}


def evaluate(split, **options):
    pursue = make_autoattack_evaluator(NETWORK, TOYS, batch_size=8)
    return pursue({"threshold": jnp.float32(0.5)}, split, KEY, **options)


@pytest.fixture
def split():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (53, 2, 2, 1), np.uint8)
    bright = images.mean((1, 2, 3)) / 255 > 0.5
    labels = np.where(np.arange(53) % 9 == 0, ~bright, bright).astype(np.int32)
    return helpers.Split(images, labels)


def test_every_example_is_charged_to_the_member_that_broke_it(split):
    outcome = evaluate(split)
    wrong = np.arange(53) % 9 == 0
    np.testing.assert_array_equal(outcome.correct()["natural"], ~wrong)
    fates = outcome.broken_by("one")
    assert set(fates) == {"natural", "first", "second", ""}
    np.testing.assert_array_equal(fates == "natural", wrong)
    np.testing.assert_array_equal(fates == "", outcome.correct()["one"])
    after = outcome.after_each("one")
    assert list(after) == ["first", "second"]
    assert after["first"] == 100 * np.mean((fates == "") | (fates == "second"))
    assert after["second"] == 100 * np.mean(fates == "")
    assert set(outcome.broken_by("two")) == {"natural", "first", ""}


def test_only_what_stands_goes_on(split):
    asked = []

    def counting(logits_fn, images, labels, number, *, key):
        jax.debug.callback(lambda pixels: asked.append(len(np.unique(pixels))), images)
        return toy("half", 0.5).part(logits_fn, images, labels, number, key=key)

    member = Member("half", lambda _: 6, counting, 1)
    attacks = {"column": AutoAttack((member,), 0.1, False)}
    pursue = make_autoattack_evaluator(NETWORK, attacks, batch_size=8)
    outcome = pursue({"threshold": jnp.float32(0.5)}, split, KEY)
    jax.effects_barrier()
    left = [
        int(np.sum((s := outcome.broken_at[0]) == -1) + np.sum(s >= i))
        for i in range(6)
    ]
    of_rest = (0, 1, 1, 2, 1)  # batches of 8, 4 and 2 for so many twos
    assert len(asked) == sum(n // 8 + of_rest[-(-(n % 8) // 2)] for n in left)
    assert len(asked) < 6 * 6


@pytest.mark.parametrize("stop_after", [1, 5, 9, 12])
def test_a_killed_evaluation_goes_on_to_the_same_outcome(split, tmp_path, stop_after):
    whole, reports = evaluate(split), []

    def stop(*report):
        reports.append(report)
        if len(reports) == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(split, folder=tmp_path, on_batch=stop)
    evaluate(split, on_batch=lambda *report: reports.append(report))
    total = len(reports) - stop_after
    more: list[Any] = []
    resumed = evaluate(
        split, folder=tmp_path, on_batch=lambda *report: more.append(report)
    )
    np.testing.assert_array_equal(resumed.broken_at, whole.broken_at)
    assert len(more) == total - stop_after
    again = evaluate(
        split, folder=tmp_path, on_batch=lambda *report: more.append(report)
    )
    np.testing.assert_array_equal(again.broken_at, whole.broken_at)
    assert more[-1] == (53, 53, "done")
    assert len(more) == total - stop_after + 1
    assert len(list(tmp_path.iterdir())) == 1


def test_progress_never_goes_back(split):
    reports: list[Any] = []
    evaluate(split, on_batch=lambda *report: reports.append(report))
    shares = [done for done, *_ in reports]
    assert shares == sorted(shares)
    assert shares[-1] == 53
    assert max(shares[:-1]) < 53
    assert reports[0][2].startswith("one: first 1/3, ")


def test_another_network_or_key_has_another_file(split, tmp_path):
    pursue = make_autoattack_evaluator(NETWORK, TOYS, batch_size=8)
    for threshold, key in ((0.5, KEY), (0.4, KEY), (0.5, jax.random.key(6))):
        variables = {"threshold": jnp.float32(threshold)}
        outcome = pursue(variables, split, key, folder=tmp_path)
        assert outcome.path is not None
        assert outcome.path.exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_adversarial_images_are_kept_on_request(split, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(split, folder=tmp_path, keep_examples=True, on_batch=stop)
    outcome = evaluate(split, folder=tmp_path, keep_examples=True)
    assert outcome.path is not None
    kept = outcome.path.with_name(f"{outcome.path.stem}-examples.npy")
    examples = np.load(kept)
    assert examples.shape == (2, *split.images.shape)
    for column, images in zip(TOYS, examples, strict=True):
        right = (images.mean((1, 2, 3)) > 0.5) == split.labels
        np.testing.assert_array_equal(right, outcome.correct()[column])
    standing = outcome.correct()["one"]
    originals = split.images.astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(examples[0][standing], originals[standing])
    kept.unlink()
    evaluate(split, folder=tmp_path, keep_examples=True)
    np.testing.assert_array_equal(np.load(kept), examples)


def test_a_run_is_evaluated_by_command(tmp_path, capsys):
    overrides = helpers.make_flags({"data.test_size": 24})
    workdir = str(tmp_path / "run")
    config = f"--config={helpers.ROOT}/configs/digits.py:st"
    assert helpers.cli.main(["train", config, f"--workdir={workdir}", *overrides]) == 0
    command = ["evaluate", f"--workdir={workdir}", "--attack=autoattack", "--norm=linf"]
    command += ["--version=custom", "--members=apgd-ce,square", "--num-examples=12"]
    assert helpers.cli.main([*command, "--epsilon=16"]) == 0
    output = capsys.readouterr().out
    assert "linf 16/255 after apgd-ce" in output
    lines = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    line = json.loads(lines[-1])
    assert line["evaluation"]["attack"] == "autoattack"
    assert line["num_test"] == 12
    after = line["autoattack"]["after_each"]["linf 16/255"]
    assert after["square"] == line["accuracy"]["linf 16/255"] <= after["apgd-ce"]
    with np.load(tmp_path / "run" / line["autoattack"]["outcome"]) as outcome:
        accuracy = 100 * np.mean(outcome["broken_at"][0] == -1)
    assert accuracy == pytest.approx(line["accuracy"]["linf 16/255"])
    assert helpers.cli.main([*command, "--num-steps=3"]) == 2
    assert "no --num-steps" in capsys.readouterr().err


@pytest.mark.slow
def test_on_two_devices_the_same_images_break(tmp_path):
    workdir = tmp_path / "1"
    config = f"--config={helpers.ROOT}/configs/digits.py:st"
    flags = helpers.make_flags({"training.epochs": 8, "data.train_size": 400})
    assert helpers.main("train", config, f"--workdir={workdir}", *flags) == 0
    shutil.copytree(workdir, tmp_path / "2")
    # Batches of 16 and 4 images, which two devices divide: the keys are the same.
    flags = ["--attack=autoattack", "--norm=linf", "--epsilon=16", "--batch-size=16"]
    flags += ["--version=custom", "--members=apgd-ce,fab-t", "--num-examples=40"]
    broken_at = {}
    for devices in ("1", "2"):
        process = helpers.start_command(
            *("evaluate", f"--workdir={tmp_path / devices}", *flags),
            JAX_NUM_CPU_DEVICES=devices,
            **helpers.QUICK_COMPILATION,
        )
        code, _, errors = helpers.finish_command(process)
        assert code == 0, errors
        (path,) = (tmp_path / devices / "autoattack").glob("*.npz")
        with np.load(path) as outcome:
            broken_at[devices] = outcome["broken_at"]
    assert {-1, 0} <= set(broken_at["1"].flat)
    # Rounding may move an image that is at the edge.
    assert np.sum(broken_at["1"] != broken_at["2"]) <= 1
