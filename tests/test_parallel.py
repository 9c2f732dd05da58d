"""One device or four: the same numbers; on two, see `test_processes.py`.

Devices are virtual ones on the CPU, which JAX makes as it starts: so in processes of
their own, which run this file as a script.
"""

import contextlib
import functools
import json
import pathlib
import sys
import types
from typing import Any

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharpness_contract import FAMILY, make_batch, make_params, update

from samrobust.attacks import (
    AutoAttack,
    Member,
    draws,
    l2,
    linf,
    noise,
    pgd,
    staged_pgd,
)
from samrobust.data import Split
from samrobust.evaluation import (
    make_autoattack_evaluator,
    make_evaluator,
    make_skip_broken_evaluator,
    measure,
)
from samrobust.experiments.run import run, train
from samrobust.system.distributed import (
    data_mesh,
    map_groups,
    replicated,
    shard_batch,
    sharded,
)
from samrobust.training import InterruptedRunError

ST, SAM = "st", "sam,rho=0.2"
# Runs whose last batch of an epoch, 6 or 3 images, the devices do not divide.
UNEVEN = {
    "groups": (
        SAM,
        {
            "data.train_size": 102,
            "sam.m": 2,
            "model.batch_norm_group": 2,
            "training.steps_per_call": 3,
        },
    ),
    "plain": (ST, {"data.train_size": 99}),
    # Whose second pass is over the examples that it chooses.
    "esam": ("esam,rho=0.2", {"training.drop_remainder": True}),
    # Whose adversaries remember: an image for each place of a batch; classes.
    "free": ("free,eps=16,m=2+rwp,gamma=0.1", {"training.drop_remainder": True}),
    "cfa": ("cfa_trades,eps=16,beta=6", {"cfa_trades.num_steps": 2}),
    # Of two networks, which go on from their mixture in the third epoch.
    "generalist": (
        "at,norm=linf,eps=16+generalist,beta=0.4",
        {"generalist.reset": 0.5, "generalist.every": 3},
    ),
}
# Sums over a batch are taken in another order, and BatchNorm and the steps of PGD
# make the differences grow; over 12 steps they stay far below this.
TOLERANCE = 1e-4


def work(folder: pathlib.Path) -> None:
    """What a process does: runs of its own; the rest of a run of one device."""
    count = jax.device_count()
    config = helpers.make_config(SAM, {"evaluation.batch_size": 47})
    dataset = helpers.load_data(config)
    workdir = helpers.make_folder(folder / str(count))
    run(config, workdir, helpers.Silent(), dataset=dataset)
    moved = folder / "moved"
    if count == 1:
        answers = iter([False] * 4)
        with contextlib.suppress(InterruptedRunError):
            stop = functools.partial(next, answers, True)
            train(config, dataset, helpers.make_folder(moved), should_stop=stop)
    else:
        train(config, dataset, moved)
        np.savez(folder / "outcomes.npz", **outcomes(33))  # pyright: ignore[reportArgumentType]
        np.savez(folder / "steps.npz", **donated_steps())  # pyright: ignore[reportArgumentType]
    for name, (row, overrides) in UNEVEN.items():
        config = helpers.make_config(
            row, {"training.drop_remainder": False, **overrides}
        )
        train(config, helpers.load_data(config), folder / f"{name} {count}")
    odd = {"training.batch_size": 33, "data.train_size": 66}
    config = helpers.make_config("st", odd)
    message = ""
    try:
        train(config, helpers.load_data(config), folder / "refused")
    except (ValueError, OSError) as error:
        message = str(error)
    (folder / f"message {count}.txt").write_text(message)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The runs on the one device of this process, and on four."""
    folder = tmp_path_factory.mktemp("parallel")
    with helpers.programs_made_once():
        work(folder)
    helpers.run_on_devices(__file__, str(folder), count=4)
    return folder


def assert_equal_runs(workdir: pathlib.Path, expected: pathlib.Path) -> None:
    helpers.assert_equal_runs(workdir, expected, tolerance=TOLERANCE)


@pytest.mark.slow
def test_several_devices_train_to_the_same_numbers(folder):
    assert_equal_runs(folder / "4", folder / "1")


def test_several_devices_measure_the_same_accuracy(folder):
    """But for one of the 48 images, which may lie on the border of its class."""
    result, expected = (
        json.loads((folder / count / "result.json").read_text()) for count in "41"
    )
    assert result["provenance"]["num_devices"] == 4
    assert result["accuracy"] == pytest.approx(expected["accuracy"], abs=100.1 / 48)


def test_a_run_moves_from_one_device_to_several(folder):
    assert_equal_runs(folder / "moved", folder / "1")


@pytest.mark.parametrize("name", ["plain", "groups"])
def test_a_last_batch_that_the_devices_do_not_divide_trains_the_same(folder, name):
    assert_equal_runs(folder / f"{name} 4", folder / f"{name} 1")


@pytest.mark.parametrize("name", ["free", "cfa", "generalist"])
def test_a_method_remembers_the_same_on_several_devices(folder, name):
    assert_equal_runs(folder / f"{name} 4", folder / f"{name} 1")


def test_chosen_examples_may_lie_on_any_device(folder):
    assert_equal_runs(folder / "esam 4", folder / "esam 1")


def donated_steps() -> dict[str, np.ndarray]:
    """Two of a method that takes single examples, and of one that skips a pass."""
    mesh, batch, leaves = data_mesh(), make_batch(8), {}

    def take(method: Any, params: Any, state: Any, batch: Any) -> Any:
        return update(method, params, state, shard_batch(batch, mesh))

    step = jax.jit(take, static_argnums=0, donate_argnums=(1, 2))
    for name in ("ssam, fisher", "looksam"):
        method = FAMILY[name]
        carry = make_params(), method.tx.init(make_params())
        for _ in range(2):
            carry = step(method, *carry, batch)
        for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
            leaves[name + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return leaves


def test_donated_steps_of_several_devices_are_those_of_one(folder):
    found = np.load(folder / "steps.npz")
    helpers.assert_close(dict(found), donated_steps(), atol=1e-6)


def test_a_batch_size_that_would_waste_devices_is_refused(folder):
    assert (folder / "message 4.txt").read_text() == (
        "Expected training.batch_size divisible by the 4 devices, got "
        "training.batch_size=33. Choose another size: with this one devices would do "
        "the same work twice."
    )


# Evaluations: every random number is a function of the seed and the example.


class Linear(nn.Module):
    """A classifier into three."""

    @nn.compact
    def __call__(self, images, *, train):
        del train
        return nn.Dense(3)(images.reshape(len(images), -1) - 0.5)


@functools.cache
def outcomes(batch_size: int) -> dict[str, np.ndarray]:
    """What becomes of 33 images under attacks that begin at random."""
    return make_outcomes(batch_size)


def make_outcomes(batch_size: int) -> dict[str, np.ndarray]:
    model, split, key = Linear(), helpers.make_split(33, side=4), jax.random.key(7)
    variables = model.init(jax.random.key(1), jnp.zeros((1, 4, 4, 1)), train=False)
    pixels = split.images / np.float32(255)
    logits: Any = model.apply(variables, pixels, train=False)
    labels = np.argmax(logits, axis=-1)
    split = Split(split.images, labels.astype(np.int32))
    few: Any = {"num_steps": 1, "step_size": 0.01, "restarts": 2}
    plain = {
        "final": pgd(linf(0.2), **few | {"restarts": 1}),
        "linf": pgd(linf(0.14), **few, judge="any"),
        "l2": pgd(l2(0.5), **few, judge="any"),
        "noise": noise(linf(0.1), num_draws=2),
    }
    staged = {"linf": staged_pgd(linf(0.14), **few), "l2": staged_pgd(l2(0.5), **few)}
    shake = noise(linf(0.1), num_draws=1)

    def part(logits_fn, images, labels, number, *, key):
        return shake(logits_fn, images, labels, key=draws.fold_in(key, number))

    ensemble = {
        "noise": AutoAttack((Member("noise", lambda _: 2, part, 1),), 0.1, False)
    }
    judge = make_evaluator(model, plain, batch_size=batch_size)
    early = make_skip_broken_evaluator(model, staged, batch_size=batch_size)
    pursue = make_autoattack_evaluator(model, ensemble, batch_size=batch_size)
    return {
        f"{prefix}{name}": correct
        for prefix, evaluate in {"": judge, "early ": early, "members ": pursue}.items()
        for name, correct in evaluate(variables, split, key).correct.items()
    }


def test_attacks_that_begin_at_random_break_some_images_and_not_all():
    for name, correct in outcomes(33).items():
        assert 0 < correct.sum() <= 33
        assert (correct.sum() == 33) == ("natural" in name)


@pytest.mark.parametrize("name", ["linf", "l2"])
def test_an_evaluation_that_leaves_the_broken_behind_starts_where_the_plain_one_does(
    name,
):
    found = outcomes(33)
    np.testing.assert_array_equal(found[f"early {name}"], found[name])


@pytest.mark.parametrize("batch_size", [1, 5, 0])
def test_what_breaks_does_not_depend_on_the_batch_size(batch_size):
    assert_same_outcomes(outcomes(batch_size), outcomes(33))


@pytest.mark.parametrize(
    ("num_devices", "batch_size", "size"),
    [(1, 0, 500), (8, 0, 4000), (8, 500, 504), (3, 2000, 501)],
)
def test_a_batch_of_an_evaluation_grows_with_the_devices_unless_its_size_is_given(
    monkeypatch, num_devices, batch_size, size
):
    mesh = types.SimpleNamespace(devices=np.zeros(num_devices))
    monkeypatch.setattr(measure, "data_mesh", lambda: mesh)
    num_examples = 500 if num_devices == 3 else 10_000
    assert measure.batch_size_for(num_examples, batch_size) == size


def test_what_breaks_does_not_depend_on_the_devices(folder):
    assert_same_outcomes(dict(np.load(folder / "outcomes.npz")), outcomes(33))


def assert_same_outcomes(found, expected):
    assert found.keys() == expected.keys()
    for name, correct in expected.items():
        np.testing.assert_array_equal(found[name], correct, err_msg=name)


# On the one device of this process.


def test_groups_are_the_consecutive_runs_of_a_batch_in_order():
    def total(shared, own, batch):
        return {"total": shared + own + jnp.sum(batch["x"]), "seen": batch["x"]}

    @functools.partial(jax.jit, static_argnums=0)
    def mapped(mesh, shared, own, batch):
        return map_groups(total, shared, own, batch, num_groups=3, mesh=mesh)

    for mesh in (None, helpers.mesh_of(1)):
        outcome = mapped(mesh, 100.0, jnp.array([10.0, 20, 30]), {"x": jnp.arange(6.0)})
        np.testing.assert_array_equal(outcome["total"], [111, 125, 139])
        np.testing.assert_array_equal(outcome["seen"], [[0, 1], [2, 3], [4, 5]])


@pytest.mark.parametrize("num_groups", [0, 4])
def test_groups_that_do_not_divide_a_batch_are_refused(num_groups):
    message = f"divisible by its number of groups, got num_groups={num_groups}, .*=6"
    with pytest.raises(ValueError, match=message):
        map_groups(lambda *_: 0, (), (), jnp.arange(6), num_groups=num_groups)


def test_the_mesh_holds_all_devices_or_those_that_are_described():
    assert data_mesh().devices.tolist() == jax.devices()
    assert helpers.mesh_of(1).devices.tolist() == jax.devices()[:1]


def test_a_batch_keeps_its_values_when_it_is_split():
    mesh = helpers.mesh_of(1)
    batch = {"x": np.arange(8.0), "y": np.ones((8, 2))}
    split = jax.jit(lambda batch: shard_batch(batch, mesh))(batch)
    helpers.assert_close(split, batch, atol=0)
    assert split["x"].sharding.is_equivalent_to(sharded(mesh), 1)
    assert replicated(mesh).is_fully_replicated


if __name__ == "__main__":
    with helpers.programs_made_once():
        work(pathlib.Path(sys.argv[1]))
