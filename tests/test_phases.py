"""Parts that come in late, and what every method leaves in a run that is stopped."""

import contextlib
import functools
import re
import sys
import types
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from samrobust.experiments import building, methods
from samrobust.experiments.networks import load_network
from samrobust.experiments.reporting.notes import sharpness_note
from samrobust.experiments.rows import parse_row
from samrobust.experiments.run import train
from samrobust.models import BatchNorm
from samrobust.sharpness import SHARPNESS, sam
from samrobust.training import InterruptedRunError, make_train_step
from samrobust.training.adversaries import ADVERSARIES
from samrobust.training.adversaries.free import free
from samrobust.training.averaging import AVERAGES
from samrobust.training.objectives import OBJECTIVES
from samrobust.training.phases import (
    Phase,
    check_phases,
    first_epoch,
    phase_of,
    waiting,
)

pytestmark = pytest.mark.usefixtures("programs_made_once")

LATE_SAM = "sam,rho=0.2,start=0.5"
LATE_BOTH = "at,norm=linf,eps=16,start=0.25+sam,rho=0.2,start=0.5"
EPOCHS = 4


def follow(row, folder, stop_after=None, **overrides):
    """The parameters after each epoch, the last state, and the lines of the log."""
    config = helpers.make_config(row, overrides)
    after, calls = [], []

    def validate(state):
        after.append(jax.device_get(state.params))
        return {"score": 0.0}

    def should_stop():
        calls.append(1)
        return len(calls) == stop_after

    data = helpers.load_data(config)
    outcome = train(config, data, folder, validate=validate, should_stop=should_stop)
    return after, jax.device_get(outcome.state), log_of(folder)


def log_of(folder):
    lines = helpers.read_lines(folder / "metrics.jsonl")
    return [helpers.without_timings(line) for line in lines]


@pytest.mark.parametrize(
    ("row", "label", "cost"),
    [
        (LATE_SAM, "SAM (rho = 0.2) from 0.5 on", 1.5),
        (
            LATE_BOTH,
            "AT (linf, eps = 16/255) from 0.25 on + SAM (rho = 0.2) from 0.5 on",
            1.5 + 0.75 * 2 * 2 / 3,
        ),
        ("looksam,rho=0.2,start=0.5", "LookSAM (rho = 0.2) from 0.5 on", 1.05),
        ("esam,rho=0.2", "ESAM (rho = 0.2)", 1 + 0.5 + 1 / 3),
        ("msam,rho=0.2", "MSAM (rho = 0.2)", 1.0),
    ],
)
def test_a_late_part_costs_its_share_of_the_epochs(row, label, cost):
    config = helpers.make_config(row)
    assert config.label == label
    assert methods.cost(config) == pytest.approx(cost)


def test_the_page_of_the_family_has_every_method_and_its_cost():
    page = (helpers.ROOT / "docs" / "sharpness.md").read_text()
    found = re.findall(r"^\| `(.*?)` .*\| ([\d.]+) \| (yes|no) \|$", page, re.MULTILINE)
    assert {row.partition(",")[0] for row, _, _ in found} == set(SHARPNESS)
    for row, cost, grouped in found:
        assert round(methods.cost(helpers.make_config(row)), 2) == float(cost)
        groups = {f"{row.partition(',')[0]}.m": 8, "model.batch_norm_group": 8}
        refused = (
            contextlib.nullcontext()
            if grouped == "yes"
            else pytest.raises((ValueError, KeyError))
        )
        with refused:
            helpers.make_config(row, groups)


def test_the_page_of_adversarial_training_has_every_method_and_its_cost():
    page = (helpers.ROOT / "docs" / "adversarial.md").read_text()
    found = re.findall(r"^\| `(.*?)` .*\| ([\d.]+) \|$", page, re.MULTILINE)
    names = {part.name for row, _ in found for part in parse_row(row).parts}
    assert names == set(ADVERSARIES) | set(OBJECTIVES) | set(AVERAGES)
    # As many steps as a field without an override has.
    full = {"attack.num_steps": 10, "data.validation_size": 8}
    for row, cost in found:
        assert round(methods.cost(helpers.make_config(row, full)), 2) == float(cost)


@pytest.mark.parametrize("epochs", [3, 20, 100, 120])
def test_a_fraction_that_is_a_whole_epoch_begins_with_that_epoch(epochs):
    """0.55 * 100 is a little more than 55 in binary."""
    fractions = [epoch / epochs for epoch in range(epochs)]
    fractions += [round(fraction, 8) for fraction in fractions]
    found = [first_epoch(fraction, epochs) for fraction in fractions]
    assert found == [*range(epochs)] * 2
    assert first_epoch(0.5 + 1e-4, 100) == 51


def test_an_adversary_that_waits_leaves_images_alone_and_learns_nothing():
    adversary, images = free(8.0), jnp.full([2, 2, 2, 1], 0.5)
    memory = jnp.full_like(images, 0.1)
    late = waiting(adversary)
    found = late.perturb(never, images, jnp.arange(2), memory, key=jax.random.key(0))
    helpers.assert_same_bits(found, (images, memory))
    assert late.learn is None
    assert late.init is adversary.init


def test_while_sharpness_waits_the_statistics_are_those_of_the_only_pass():
    """And not what it keeps of a second pass, which it has yet to take."""
    key, labels = jax.random.key(0), jnp.array([0, 1, 0, 1])
    images = jax.random.uniform(key, (4, 2, 2, 1))
    network = Normalizing()
    shapes = jax.eval_shape(functools.partial(network.init, train=False), key, images)
    late = waiting(sam(0.1, aux=shapes["batch_stats"]))
    found, plain = (
        method.train_step(method.init(key, images), images, labels, key)[0].variables
        for tx in (optax.chain(late, optax.sgd(0.1)), optax.sgd(0.1))
        for method in [make_train_step(network, tx)]
    )
    helpers.assert_same_bits(found, plain)


class Normalizing(nn.Module):
    """The least with running statistics."""

    @nn.compact
    def __call__(self, images, *, train):
        flat = images.reshape(len(images), -1)
        return nn.Dense(2)(BatchNorm()(flat, train=train))


def never(images):
    raise AssertionError(images)


def test_until_its_start_a_late_part_is_not_there_bit_for_bit(tmp_path):
    plain, _, plain_lines = follow("st", tmp_path / "st")
    late, _, lines = follow(LATE_SAM, tmp_path / "late")
    for epoch in range(2):
        helpers.assert_same_bits(late[epoch], plain[epoch])
    assert not np.array_equal(*(jax.tree.leaves(p[2])[0] for p in (late, plain)))
    applied = [line["applied_rho"] for line in lines]
    np.testing.assert_allclose(applied, [0, 0, 0.2, 0.2], rtol=1e-5)
    for line, expected in zip(lines[:2], plain_lines, strict=False):
        assert expected["gradient_norm"] == line["gradient_norm"] > 0
    assert sharpness_note(lines).startswith(
        "Gradients at moved weights in 2 of 4 epochs: "
    )


def test_two_late_parts_make_three_phases():
    config = helpers.make_config(LATE_BOTH)
    earlier = building.make_training(config, helpers.load_data(config), 3).earlier
    assert [phase.until for phase in earlier] == [3, 6]
    assert [phase_of(earlier, step) for step in (0, 2, 3, 5, 6, 11)] == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]


STOPPED = {
    LATE_SAM: 7,  # in the first epoch of the second phase
    "looksam,rho=0.2+swa,start=0.25": 5,
    "ssam,mask=dynamic,rho=0.2": 5,
    "entropy_sgd,gamma=0.03": 5,
    "free,eps=16,m=3+ema,decay=0.9": 4,  # after the first of three replays
    "dynamic,eps=16": 5,
    "cfa_trades,eps=16,beta=6": 4,
    "at,norm=linf,eps=16+generalist,beta=0.4": 10,  # the natural expert's turn, too
}


@pytest.mark.parametrize("row", STOPPED)
def test_a_stopped_run_goes_on_with_the_memory_of_its_method(row, tmp_path):
    small = {"looksam.k": 3, "entropy_sgd.inner_steps": 4}
    small |= {"model.batch_norm_group": 0}
    _, whole, lines = follow(row, tmp_path / "whole", **small)
    with pytest.raises(InterruptedRunError):
        follow(row, tmp_path / "stopped", STOPPED[row], **small)
    _, resumed, again = follow(row, tmp_path / "stopped", **small)
    helpers.assert_same_bits(resumed, whole)
    assert again == lines


WRONG = {
    "sam,rho=0.2,start=0": "0 < start",
    "sam,rho=0.2,start=1": "start <= 0.999",
    "sam,start=0.5,rho=0.2": "the row 'sam,rho=0.2,start=0.5'",
    "trades,norm=linf,eps=8,beta=6,start=0.5": "the options norm, eps, beta for trades",
    "msam,rho=0.2,start=0.5": "the options rho for msam",
}


@pytest.mark.parametrize("ends", [(2,), (6, 3), (3, 4)])
def test_phases_that_do_not_end_with_an_epoch_in_order_are_refused(ends):
    step: Any = None
    with pytest.raises(ValueError, match=r"end with an epoch, of 3 steps, got until="):
        check_phases([Phase(end, step) for end in ends], 3)


@pytest.mark.parametrize("row", WRONG)
def test_a_start_that_cannot_be_is_refused(row):
    with pytest.raises(ValueError, match=WRONG[row]):
        parse_row(row)


def test_what_wraps_the_optimizer_cannot_begin_late_somebodys_own_too(monkeypatch):
    def wrapped(rho, *, optimizer, aux=None, grouped=False):
        del rho, aux, grouped
        return optimizer

    own = types.SimpleNamespace(wrapped=wrapped)
    monkeypatch.setitem(sys.modules, "wraps_the_optimizer", own)
    row = "wraps_the_optimizer:wrapped,rho=0.2"
    assert parse_row(row).name == row
    with pytest.raises(ValueError, match="the options rho for wraps_the_optimizer"):
        parse_row(f"{row},start=0.5")


GROUPS = {"METHOD.m": 8, "model.batch_norm_group": 8}


@pytest.mark.parametrize(
    ("row", "overrides", "message"),
    [
        (
            "sam,rho=0.2,start=0.9",
            {},
            r"sam\.start that leaves one of 4 epochs, got sam\.start=0\.9",
        ),
        ("st", {"sam.start": 0.5}, "a row with sam when sam.start is set"),
        (
            "friendly_sam,rho=0.2",
            GROUPS,
            r"with friendly_sam, got friendly_sam\.m=8",
        ),
        ("esam,rho=0.2", GROUPS, r"with esam, got esam\.m=8"),
    ],
)
def test_what_a_method_cannot_do_is_refused_before_any_work(row, overrides, message):
    name = row.partition(",")[0]
    overrides = {key.replace("METHOD", name): v for key, v in overrides.items()}
    with pytest.raises(ValueError, match=message):
        helpers.make_config(row, overrides)


def test_entropy_sgd_is_refused_where_it_would_never_move_the_weights():
    config = helpers.make_config("entropy_sgd,gamma=0.03", {"training.epochs": 1})
    with pytest.raises(ValueError, match=r"entropy_sgd\.inner_steps <= 4 updates, got"):
        building.make_training(config, helpers.load_data(config), 4)


def test_a_network_of_entropy_sgd_is_read_whose_rounds_are_longer_than_its_epochs(
    tmp_path,
):
    longer = {"entropy_sgd.inner_steps": 6, "training.epochs": 2}
    config = helpers.make_config("entropy_sgd,gamma=0.03", longer)
    dataset = helpers.load_data(config)
    state = train(config, dataset, tmp_path).state
    network = load_network(config, dataset, tmp_path, "last")
    helpers.assert_same_bits(network.variables, state.eval_variables)


def test_entropy_sgd_is_refused_with_an_optimizer_whose_place_it_takes():
    with pytest.raises(
        ValueError, match=r"training\.optimizer=sgd with entropy_sgd, got"
    ):
        helpers.make_config("entropy_sgd,gamma=0.03", {"training.optimizer": "adamw"})


@pytest.mark.parametrize(
    ("optimizer", "decay"), [("sgd", 0.1), ("adam", 0.1), ("adamw", 0.0)]
)
def test_awp_is_told_of_the_decay_that_its_optimizer_adds_to_gradients(
    optimizer, decay, monkeypatch
):
    given, build = [], methods.build
    fields = {"training.optimizer": optimizer, "training.weight_decay": 0.1}
    config = helpers.make_config("awp,gamma=0.01", fields)
    monkeypatch.setattr(
        methods, "build", lambda *args: given.append(args[1]) or build(*args)
    )
    building.make_training(config, building.load_facts(config), 1)
    assert [one.weight_decay for one in given] == [decay]
