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

from samrobust.attacks import (
    ATTACKS_VERSION,
    AutoAttack,
    Member,
    autoattack,
    draws,
    l2,
    linf,
)
from samrobust.attacks.losses import normalized
from samrobust.evaluation import Archive, make_autoattack_evaluator, measure
from samrobust.evaluation.examples import ExamplesFile
from samrobust.evaluation.fates import identify

KEY = jax.random.key(5)
RADII = {"linf": linf(0.05), "l2": l2(0.2)}


@pytest.fixture(autouse=True)
def _only_tell_of_batches(monkeypatch):
    monkeypatch.setattr(measure, "_SECONDS_UNTOLD", 1e9)


def run(attack, logits_fn, images, labels):
    """The attack in `jit`."""
    return jax.jit(functools.partial(attack, logits_fn))(images, labels, key=KEY)


def make_problem(num_classes=5, num_images=24):
    """A small random network that bends, and images at all distances from its edges."""
    rng = np.random.default_rng(num_classes)
    w1 = (rng.standard_normal((16, 12)) / 2).astype(np.float32)
    w2 = rng.standard_normal((12, num_classes)).astype(np.float32)
    images = rng.uniform(size=(num_images, 4, 4, 1)).astype(np.float32)

    def logits_fn(images, *, key=None):
        logits = jnp.tanh((images.reshape(len(images), -1) - 0.5) @ w1) @ w2
        if key is None:
            return logits
        return logits + 0.01 * jax.random.normal(key, logits.shape)

    hidden = np.tanh((images.reshape(num_images, -1) - 0.5) @ w1)
    labels = np.argmax(hidden @ w2, axis=-1).astype(np.int32)
    labels[0] = (labels[0] + 1) % num_classes
    return logits_fn, jnp.asarray(images), labels


@functools.cache
def attacked(norm, **options):
    logits_fn, images, labels = make_problem()
    attack = autoattack(RADII[norm], **options)
    result = run(attack, logits_fn, images, labels)
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


# What each comes to, along a random direction: all, `apgd-ce` alone, `square` alone.
PERTURBATIONS = {"linf": [0.00, 0.30, -0.86], "l2": [0.42, 0.42, 0.03]}


@pytest.mark.parametrize("norm", list(RADII))
def test_attacks_that_come_to_other_images_have_another_version(norm):
    """Raise it with these numbers: what is stored of older attacks counts no more."""
    found = []
    for members in ([], ["apgd-ce"], ["square"]):
        version = {"version": "custom", "members": tuple(members)} if members else {}
        delta = attacked(norm, **version)[0] - np.asarray(make_problem()[1])
        direction = np.random.default_rng(1).standard_normal(delta.shape)
        found.append(float(np.vdot(delta, direction)))
    assert (ATTACKS_VERSION, found) == (2, pytest.approx(PERTURBATIONS[norm], abs=0.02))


def test_without_a_radius_nothing_changes_and_with_a_large_one_nothing_stands():
    logits_fn, images, labels = make_problem()
    unchanged = autoattack(linf(0.0))(logits_fn, images, labels, key=KEY)
    np.testing.assert_array_equal(unchanged, images)
    attack = autoattack(linf(1.0), version="custom", members=["apgd-ce"])
    broken = run(attack, logits_fn, images, labels)
    assert not np.any(jnp.argmax(logits_fn(broken), -1) == labels)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_few_classes_leave_fewer_targets_and_another_loss(num_classes):
    logits_fn, images, labels = make_problem(num_classes, num_images=16)
    attack = autoattack(linf(0.03), version="custom", members=["apgd-t", "fab-t"])
    parts = [member.num_parts(num_classes) for member in attack.members]
    assert parts == [1, num_classes - 1]
    result = run(attack, logits_fn, images, labels)
    standing = np.asarray(jnp.argmax(logits_fn(result), -1) == labels)
    assert 0 < standing.mean() < 1


def test_a_random_classifier_is_attacked_over_its_draws():
    logits_fn, images, labels = make_problem(num_images=4)
    attack = autoattack(linf(0.1), version="rand")
    assert [member.name for member in attack.members] == ["apgd-ce", "apgd-dlr"]

    def noisy(images, *, key):  # a key must be given
        return logits_fn(images, key=key)

    result = run(attack, noisy, images, labels)
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


# Over a split


def toy(name, broken_share, num_parts=1):
    """A member that breaks an example where a coin says so."""

    def part(_, images, labels, number, *, key):
        drawn = draws.uniform(draws.fold_in(key, number), labels.shape)
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


@functools.cache
def pursuer(batch_size=8):
    return make_autoattack_evaluator(NETWORK, TOYS, batch_size=batch_size)


def evaluate(
    split, *, batch_size=8, folder=None, on_batch=lambda *_: None, **of_archive
):
    """The outcome for a split's examples; kept where a folder is given."""
    return pursuer(batch_size)(
        *({"threshold": jnp.float32(0.5)}, split, KEY),
        archive=Archive(folder, **of_archive) if folder else None,
        on_batch=on_batch,
    )


def assert_same_fates(found, expected):
    assert found.fates.keys() == expected.fates.keys()
    for column, fates in found.fates.items():
        np.testing.assert_array_equal(fates.broken_at, expected.fates[column].broken_at)


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
    np.testing.assert_array_equal(outcome.correct["natural"], ~wrong)
    fates = outcome.fates["one"].broken_by()
    assert set(fates) == {"natural", "first", "second", ""}
    np.testing.assert_array_equal(fates == "natural", wrong)
    np.testing.assert_array_equal(fates == "", outcome.correct["one"])
    after = outcome.fates["one"].after_each()
    assert list(after) == ["first", "second"]
    assert after["first"] == 100 * np.mean((fates == "") | (fates == "second"))
    assert after["second"] == 100 * np.mean(fates == "")
    assert set(outcome.fates["two"].broken_by()) == {"natural", "first", ""}


def test_every_member_draws_random_numbers_of_its_own(split):
    """With those of the first, the second would break nothing that it left."""
    members = toy("first", 0.5), toy("second", 0.5)
    pursue = make_autoattack_evaluator(
        NETWORK, {"a": AutoAttack(members, 0.1, False)}, batch_size=64
    )
    outcome = pursue({"threshold": jnp.float32(0.5)}, split, KEY)
    assert set(outcome.fates["a"].broken_by()) == {"natural", "first", "second", ""}


@pytest.mark.parametrize("batch_size", [8, 64])
def test_only_what_stands_goes_on_in_batches_that_fit(split, batch_size):
    asked = []

    def counting(logits_fn, images, labels, number, *, key):
        jax.debug.callback(lambda pixels: asked.append(len(pixels)), images)
        return toy("half", 0.5).part(logits_fn, images, labels, number, key=key)

    member = Member("half", lambda _: 6, counting, 1)
    attacks = {"column": AutoAttack((member,), 0.1, False)}
    pursue = make_autoattack_evaluator(NETWORK, attacks, batch_size=batch_size)
    outcome = pursue({"threshold": jnp.float32(0.5)}, split, KEY)
    jax.effects_barrier()
    row = outcome.fates["column"].broken_at
    left = [int(np.sum((row == -1) | (row >= stage))) for stage in range(6)]
    for number in filter(None, left):
        slots = size = asked.pop(0)
        while slots < number:
            assert asked.pop(0) == size
            slots += size
        # A quarter of a batch at most, for three quarters of a member's examples are
        # left, and an eighth between sizes. Of several batches only the last has any.
        padding = slots - number
        assert padding <= (0.375 if slots == size else 1) * size
        assert size <= batch_size
    assert not asked
    assert left[0] > 2 * left[-1]


class Told(list):
    """Reports of attacks; stops after some."""

    def __init__(self, stop_after: int = -1):
        super().__init__()
        self.stop_after = stop_after

    def __call__(self, *report):
        if report[2] != "natural":
            self.append(report)
        if len(self) == self.stop_after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop_after", [0, 1, 5, 9, 12])
def test_a_killed_evaluation_goes_on_to_the_same_outcome(split, tmp_path, stop_after):
    whole, everything = evaluate(split), Told()
    evaluate(split, on_batch=everything)
    with pytest.raises(KeyboardInterrupt):
        evaluate(split, folder=tmp_path, on_batch=Told(stop_after))
    more = Told()
    resumed = evaluate(split, folder=tmp_path, on_batch=more)
    assert_same_fates(resumed, whole)
    again = evaluate(split, folder=tmp_path, on_batch=more)  # only reads
    assert_same_fates(again, whole)
    assert more[-1] == (53, 53, "done")
    assert len(more) == len(everything) - stop_after
    assert len(list(tmp_path.iterdir())) == len(TOYS)


def test_a_slower_process_does_not_replace_what_another_has_finished(split, tmp_path):
    def overtake(*report):
        if report[2] != "natural":
            evaluate(split, folder=tmp_path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(split, folder=tmp_path, on_batch=overtake)
    told = Told()
    assert_same_fates(evaluate(split, folder=tmp_path, on_batch=told), evaluate(split))
    assert told == []  # nothing was left to do


@pytest.mark.parametrize("batch_size", [5, 64])
def test_what_breaks_depends_neither_on_the_batch_size_nor_on_changing_it(
    split, tmp_path, batch_size
):
    with pytest.raises(KeyboardInterrupt):
        evaluate(split, folder=tmp_path, on_batch=Told(5))
    options = {"folder": tmp_path, "batch_size": batch_size}
    for outcome in (evaluate(split, **options), evaluate(split, batch_size=batch_size)):
        assert_same_fates(outcome, evaluate(split))
    assert len(list(tmp_path.iterdir())) == len(TOYS)


def test_another_attack_is_made_beside_those_that_are_stored(split, tmp_path):
    whole, network = evaluate(split), {"threshold": jnp.float32(0.5)}
    for columns, expected in (
        (["two"], ["two"]),
        (["one", "two"], ["one"]),
        (["two", "one"], []),
    ):
        attacks = {column: TOYS[column] for column in columns}
        pursue = make_autoattack_evaluator(NETWORK, attacks, batch_size=8)
        told = Told()
        outcome = pursue(network, split, KEY, archive=Archive(tmp_path), on_batch=told)
        attacked = [doing.split(":")[0] for *_, doing in told if doing != "done"]
        assert list(dict.fromkeys(attacked)) == expected
        assert list(outcome.correct) == ["natural", *columns]
        for column, correct in outcome.correct.items():
            np.testing.assert_array_equal(correct, whole.correct[column])


def test_what_a_stopped_first_batch_leaves_as_wrong_is_so_for_all(split, tmp_path):
    """No example is through with a stage then."""
    with pytest.raises(KeyboardInterrupt):
        evaluate(split, folder=tmp_path, on_batch=Told(0))
    stopped = [path for path in tmp_path.iterdir() if path.suffix == ".npz"]
    assert len(stopped) == len(TOYS)
    number = 1
    for path in stopped[:1]:
        broken(path, -2, number)
    after = evaluate(split, folder=tmp_path)
    assert not any(correct[number] for correct in after.correct.values())


def test_what_one_stored_attack_has_as_wrong_before_it_is_so_for_all(split, tmp_path):
    """Rounding may decide otherwise on another machine, where the next column is."""
    before: Any = evaluate(split, folder=tmp_path)
    number = np.flatnonzero(before.correct["two"])[0]
    for column in TOYS:
        path: Any = before.fates[column].path
        if column == "one":
            path.unlink()
        else:
            broken(path, -2, number)
    after = evaluate(split, folder=tmp_path)
    assert not any(correct[number] for correct in after.correct.values())
    for column, correct in after.correct.items():
        others = np.arange(53) != number
        np.testing.assert_array_equal(correct[others], before.correct[column][others])
    assert after.fates["one"].after_each()["second"] == after.accuracy["one"]


def test_batches_are_no_larger_than_the_split(split):
    sizes = []

    def watching(logits_fn, images, labels, number, *, key):
        sizes.append(len(images))
        return toy("half", 0.5).part(logits_fn, images, labels, number, key=key)

    attacks = {"a": AutoAttack((Member("half", lambda _: 1, watching, 1),), 0.1, False)}
    pursue = make_autoattack_evaluator(NETWORK, attacks, batch_size=500)
    pursue({"threshold": jnp.float32(0.5)}, split, KEY)
    assert max(sizes) <= 53


def test_progress_never_goes_back(split):
    reports: list[Any] = []
    evaluate(split, on_batch=lambda *report: reports.append(report))
    shares = [done for done, *_ in reports]
    assert shares == sorted(shares)
    assert shares[-1] == 53
    assert max(shares[:-1]) < 53
    assert reports[0] == (0, 53, "natural")
    first = next(doing for _, _, doing in reports if doing != "natural")
    assert first.startswith("one: first 1/3, ")


# The file of an outcome


def rewrite(path, **changes):
    """Stores other values in a file, and takes out those that are None."""
    with np.load(path) as file:
        content = dict(file) | changes
    np.savez(path, **{k: v for k, v in content.items() if v is not None})


def broken(path, value, example=1):
    with np.load(path) as file:
        values = file["broken_at"]
    values[example] = value
    rewrite(path, broken_at=values)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: 10**3]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "twice its half": lambda path: path.write_bytes(2 * path.read_bytes()[:2000]),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(4000)),
    "no archive": lambda path: path.write_bytes(b"accuracy: 99.9"),
    "an array": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': 3"),
    "a pickle": lambda path: rewrite(path, place=np.array([{}])),
    "a flipped bit": lambda path: path.write_bytes(
        path.read_bytes().replace(b"\xfe\xff", b"\xff\xff", 1)  # -2, now -1
    ),
    "no fates": lambda path: rewrite(path, broken_at=None),
    "no identity": lambda path: rewrite(path, about=None),
    "another identity": lambda path: rewrite(path, about=np.array("{}")),
    "no place": lambda path: rewrite(path, place=None),
    "another dtype": lambda path: rewrite(path, broken_at=np.zeros(53)),
    "another shape": lambda path: rewrite(path, broken_at=np.zeros(9, np.int16)),
    "a place beyond the end": lambda path: rewrite(path, place=np.array([5, 0])),
    "a place before the start": lambda path: rewrite(path, place=np.array([-1, 0])),
    "a place of another kind": lambda path: rewrite(path, place=np.array([0, 0, 0])),
    "an example beyond the end": lambda path: rewrite(path, place=np.array([3, 54])),
    "broken by no stage": lambda path: broken(path, 4),
    "another fate": lambda path: broken(path, -3),
    "broken before its stage": lambda path: rewrite(path, place=np.array([0, 1])),
    "infinite where it stands": lambda path: rewrite(
        path, non_finite=np.ones(53, bool)
    ),
    "provenance of nobody": lambda path: rewrite(path, provenance=np.array("[3]")),
}


def stored(split, folder, **of_archive):
    """The file of the first column of a finished evaluation."""
    path = evaluate(split, folder=folder, **of_archive).fates["one"].path
    assert path is not None
    return path


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_outcome_is_moved_aside_and_made_again(split, tmp_path, damage):
    path = stored(split, tmp_path)
    DAMAGE[damage](path)
    harmed = path.read_bytes()
    assert_made_again(split, path)
    assert path.with_name(f"{path.name}.aside").read_bytes() == harmed


def test_a_folder_in_place_of_an_outcome_is_moved_aside(split, tmp_path):
    path = stored(split, tmp_path)
    path.unlink()
    path.mkdir()
    assert_made_again(split, path)


def assert_made_again(split, path):
    with pytest.warns(UserWarning, match="AutoAttack starts over") as caught:
        outcome = evaluate(split, folder=path.parent)
    (message,) = (str(warning.message) for warning in caught)
    assert "\n" not in message
    assert len(message) < 400
    for found in (outcome, evaluate(split, folder=path.parent)):
        assert_same_fates(found, evaluate(split))


def test_what_is_moved_aside_a_second_time_replaces_nothing(split, tmp_path):
    for count in (1, 2):
        stored(split, tmp_path).write_bytes(b"")
        with pytest.warns(UserWarning, match="starts over"):
            evaluate(split, folder=tmp_path)
        assert len(list(tmp_path.glob("*.aside*"))) == count


def test_the_outcome_of_another_network_counts_for_nothing(split, tmp_path):
    """Under the name of this one, as a copied folder leaves it."""
    own = evaluate(split, folder=tmp_path)
    other = pursuer()(
        {"threshold": jnp.float32(0.4)}, split, KEY, archive=Archive(tmp_path)
    )
    paths: list[Any] = [outcome.fates["one"].path for outcome in (other, own)]
    assert np.any(other.correct["one"] != own.correct["one"])
    paths[0].replace(paths[1])
    with pytest.warns(UserWarning, match="of another network, split or attack"):
        outcome = evaluate(split, folder=tmp_path)
    assert_same_fates(outcome, own)


def test_what_the_outcome_depends_on_is_in_its_name(split, monkeypatch):
    class Other(Brightness):
        pass

    plain = [NETWORK, {"threshold": jnp.float32(0.5)}, split, KEY]
    other = [
        Other(),
        {"threshold": jnp.float32(0.4)},
        helpers.Split(split.images, 1 - split.labels),
        jax.random.key(6),
    ]
    asked = [[*plain[:i], other[i], *plain[i + 1 :]] for i in range(4)]
    asked += [plain, [*plain[:3], jax.random.key(5, impl="rbg")]]
    asked += [[plain[0], {"bias": plain[1]["threshold"]}, *plain[2:]]]
    found = [identify(*each) for each in asked]
    found.append(identify(*plain, radii={"one": 0.2}))
    monkeypatch.setattr("samrobust.evaluation.fates.ATTACKS_VERSION", -1)
    found.append(identify(*plain))
    assert len({json.dumps(each, sort_keys=True) for each in found}) == 9


def test_the_ball_of_an_attack_is_in_the_name_of_its_outcome(split, tmp_path):
    def part(_, images, labels, number, *, key):
        del labels, number, key
        return images

    member = Member("none", lambda _: 1, part, 1)
    same = ((member,), 0.1, False)
    others = (
        AutoAttack(*same),
        AutoAttack(*same, order=2.0),
        AutoAttack(*same, box=(-1.0, 1.0)),
        AutoAttack(same[0], 0.2, False),
    )
    for attack in others:
        pursue = make_autoattack_evaluator(NETWORK, {"a": attack}, batch_size=8)
        archive = Archive(tmp_path)
        pursue({"threshold": jnp.float32(0.5)}, split, KEY, archive=archive)
    assert len(list(tmp_path.iterdir())) == len(others)
    assert [autoattack(ball).order for ball in RADII.values()] == [jnp.inf, 2]


def test_who_made_an_outcome_stays_with_it(split, tmp_path):
    first, second = {"commit": "first"}, {"commit": "second"}
    with pytest.raises(KeyboardInterrupt):
        evaluate(split, folder=tmp_path, on_batch=Told(3), provenance=first)
    for who in ("second", "a reader", "another"):
        outcome = evaluate(split, folder=tmp_path, provenance={"commit": who})
        assert outcome.fates["one"].provenance == (first, second)
        assert outcome.fates["two"].provenance == (second,)
        assert outcome.ended_by == {"one": second, "two": second}
        begun_by = outcome.details["autoattack"]["begun_by"]
        assert begun_by == {"one": first, "two": second}


def test_a_folder_that_cannot_be_written_is_found_before_the_attack(split, tmp_path):
    (tmp_path / "file").write_text("")
    told = Told()
    with pytest.raises(OSError, match="file"):
        evaluate(split, folder=tmp_path / "file", on_batch=told)
    assert told == []


def test_adversarial_images_are_kept_on_request(split, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(split, folder=tmp_path, examples=True, on_batch=stop)
    outcome = evaluate(split, folder=tmp_path, examples=True)
    originals = split.images.astype(np.float32) / np.float32(255)
    for column, fates in outcome.fates.items():
        assert fates.path is not None
        examples = np.load(fates.path.with_name(f"{fates.path.stem}-examples.npy"))
        assert examples.shape == split.images.shape
        right = (examples.mean((1, 2, 3)) > 0.5) == split.labels
        standing = outcome.correct[column]
        np.testing.assert_array_equal(right, standing)
        np.testing.assert_array_equal(examples[standing], originals[standing])


EXAMPLES_DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut in half": lambda path: path.write_bytes(
        path.read_bytes()[: path.stat().st_size // 2]
    ),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "black": lambda path: np.save(path, np.zeros_like(np.load(path))),
    "of other images": lambda path: np.save(path, np.load(path)[::-1]),
    "of another shape": lambda path: np.save(path, np.load(path)[:20]),
    "of another dtype": lambda path: np.save(path, np.load(path).view(np.int32)),
}


@pytest.mark.parametrize("damage", EXAMPLES_DAMAGE)
def test_damaged_images_are_made_again(split, tmp_path, damage):
    path = stored(split, tmp_path, examples=True)
    kept = path.with_name(f"{path.stem}-examples.npy")
    examples = np.load(kept)
    EXAMPLES_DAMAGE[damage](kept)
    with pytest.warns(UserWarning, match=r"-examples\.npy .* AutoAttack starts over"):
        evaluate(split, folder=tmp_path, examples=True)
    np.testing.assert_array_equal(np.load(kept), examples)


def test_images_that_the_outcome_does_not_know_yet_are_no_damage(split, tmp_path):
    """A kill comes between the images and the file that tells of them."""
    path = stored(split, tmp_path, examples=True)
    kept = path.with_name(f"{path.stem}-examples.npy")
    examples = np.load(kept)
    path.unlink()
    options = {"folder": tmp_path, "examples": True}
    with pytest.raises(KeyboardInterrupt):
        evaluate(split, **options, on_batch=Told(3))
    np.save(kept, np.where(np.load(kept) == examples, examples, 0.3))
    evaluate(split, folder=tmp_path, examples=True)
    np.testing.assert_array_equal(np.load(kept), examples)


def test_the_images_of_examples_that_stand_are_the_natural_ones_again(tmp_path):
    """As after a kill between the file of images and that of fates."""
    images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
    file = ExamplesFile(tmp_path / "images.npy", images)
    file.create()
    file.put(np.array([0, 1]), np.full((2, 2, 2, 1), 0.5))
    file.flush()
    again = ExamplesFile(file.path, images)
    assert again.reopen(np.array([True, False, False]), file.sums) == ""
    again.flush()
    expected = images.astype(np.float32) / np.float32(255)
    expected[0] = 0.5
    np.testing.assert_array_equal(np.load(file.path), expected)


def test_a_network_without_finite_logits_is_refused_and_leaves_no_number(
    split, tmp_path
):
    variables, archive = {"threshold": jnp.float32(jnp.nan)}, Archive(tmp_path)
    with pytest.raises(ValueError, match=r"finite logits, got images_without=53"):
        pursuer()(variables, split, KEY, archive=archive)


def test_an_evaluation_tells_probabilities_from_logits(split):
    class Softmax(Brightness):
        def apply(self, variables, images, train):
            return jax.nn.softmax(super().apply(variables, images, train))

    model: Any = Softmax()
    pursue = make_autoattack_evaluator(model, TOYS, batch_size=8)
    with pytest.warns(UserWarning, match="sum to 1, as probabilities do"):
        pursue({"threshold": jnp.float32(0.5)}, split, KEY)


def test_the_attack_tells_probabilities_from_logits_where_it_sees_them():
    logits_fn, images, labels = make_problem(num_images=4)
    attack = AutoAttack((), 0.1, is_random=False)
    with pytest.warns(UserWarning, match="sum to 1, as probabilities do"):
        attack(lambda x: jax.nn.softmax(logits_fn(x)), images, labels, key=KEY)
    attack(logits_fn, images, labels, key=KEY)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_probabilities_are_known_whatever_their_rounding(dtype):
    logits = jax.random.normal(KEY, [100, 1000], dtype) * 3
    assert normalized(jax.nn.softmax(logits)).all()
    assert not normalized(jax.nn.log_softmax(logits)).any()
    assert not normalized(jax.nn.softmax(logits) * 1.1).any()
    assert not normalized(jax.nn.softmax(logits) - 2e-3).any()


def test_images_without_finite_logits_are_broken_and_counted(split, tmp_path):
    def blind(logits_fn, images, labels, number, *, key):
        del logits_fn, labels, number, key
        return jnp.full_like(images, jnp.nan)

    attacks = {"a": AutoAttack((Member("blind", lambda _: 1, blind, 1),), 0.1, False)}
    pursue = make_autoattack_evaluator(NETWORK, attacks, batch_size=8)
    told = r"highest logit is NaN or infinite .*\(47 under a\)"
    for _ in range(2):  # the second time out of the file
        with pytest.warns(UserWarning, match=told):
            outcome = pursue(
                *({"threshold": jnp.float32(0.5)}, split, KEY),
                archive=Archive(tmp_path),
            )
        assert outcome.correct["natural"].sum() == 47
        assert not outcome.correct["a"].any()
        assert outcome.details["non_finite"] == {"a": 47}


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
    outcome = line["autoattack"]["outcome"]["linf 16/255"]
    assert str(tmp_path / "run" / outcome) in "".join(output.split("\n"))
    with np.load(tmp_path / "run" / outcome) as fates:
        accuracy = 100 * np.mean(fates["broken_at"] == -1)
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
    flags = ["--attack=autoattack", "--norm=linf", "--epsilon=16", "--batch-size=16"]
    flags += ["--version=custom", "--members=apgd-ce,fab-t", "--num-examples=40"]
    broken_at = {}
    for devices in ("1", "2"):
        process = helpers.start_command(
            *("evaluate", f"--workdir={tmp_path / devices}", *flags),
            JAX_NUM_CPU_DEVICES=devices,
        )
        code, _, errors = helpers.finish_command(process)
        assert code == 0, errors
        (path,) = (tmp_path / devices / "autoattack").glob("*.npz")
        with np.load(path) as outcome:
            broken_at[devices] = outcome["broken_at"]
    assert {-1, 0} <= set(broken_at["1"].flat)
    # Rounding may move an image that is at the edge.
    assert np.sum(broken_at["1"] != broken_at["2"]) <= 1


def test_images_that_square_cannot_attack_are_refused_before_any_member_attacks():
    def never(images):
        raise AssertionError(images)

    images = jnp.full([2, 4], 0.5)
    with pytest.raises(ValueError, match=r"Expected images \[B, H, W, C\], got shape"):
        autoattack(linf(0.1))(never, images, jnp.zeros(2, int), key=jax.random.key(0))
