"""How often the devices of one run wait for each other in a training step.

Counted in the programs that XLA makes for eight virtual devices, by this file as a
script. They have the form that accelerators run: on CPUs BatchNorm is differentiated as
its formulas stand, with more than twice as many. What is said of PreActResNet-18 in
docs/scaling.md is held to the counts in results/, compiled for GPUs.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from samrobust.experiments import building
from samrobust.models import batch_norm
from samrobust.studies.bench.hlo import kernels
from samrobust.system.distributed import data_mesh, replicated, sharded
from samrobust.training import log
from samrobust.training.epoch import EpochRunner

BATCH, DEVICES = 16, 8
LOCAL = BATCH // DEVICES
# Of a network with one block of width 2: layers of BatchNorm, and parameters without
# theirs, whose gradients are BatchNorm's sums.
LAYERS, PARAMETERS = 3, 120
NORM_BYTES = LAYERS * 2 * 2 * 2 * 4  # two sums forward and back, of two channels
# Row; size of BatchNorm's groups, 0: the global batch; passes through all layers in
# which it waits; those that end in gradients of the parameters; all-reduces besides.
CASES = {
    "st": ("st", 0, 1, 1, 0),
    "sam": ("sam,rho=0.2", 0, 2, 2, 0),
    "at": ("at,norm=linf,eps=16", 0, 3, 1, 0),  # of two steps
    # Of running statistics, of which each group has its own.
    "groups of two devices": ("st", 2 * LOCAL, 1, 1, 1),
    "groups of a device": ("sam,rho=0.2", LOCAL, 0, 2, 0),
}


def count(name: str) -> tuple[float, float]:
    """The collective operations of one step, and the bytes that a device brings."""
    row, group, *_ = CASES[name]
    sizes = {"training.batch_size": BATCH, "model.batch_norm_group": group}
    config = helpers.make_config(row, sizes)
    dataset, mesh = helpers.load_data(config), data_mesh()
    plan = building.make_plan(config, len(dataset.train))
    built = building.make_training(config, dataset, plan.num_steps)
    key = jax.random.key(0)
    runner = EpochRunner(
        *(built.method.train_step, plan, dataset.train),
        padding=0,
        flip=False,
        mesh=mesh,
        key=key,
    )
    carry = jax.jit(built.begin, out_shardings=replicated(mesh))(key)
    program = runner.compile(plan.chunks()[0], [carry])
    text = program.as_text()  # pyright: ignore[reportFunctionMemberAccess]
    found = [each for each in kernels(text) if each.kind == "collectives"]
    return sum(k.runs for k in found), sum(k.runs * k.num_bytes for k in found)


def errors() -> list[float]:
    """How far BatchNorm of a split batch is from its formulas, and its gradients."""
    rng, form = np.random.default_rng(0), batch_norm._Form(1e-5, True, jnp.float64)
    inputs, slopes = rng.normal(size=(2, BATCH, 2, 2, 3))
    shift, scale, bias = rng.normal(size=(3, 3))

    def total(normalize: Callable[..., Any], *arguments: Any) -> Any:
        outputs, mean, var = normalize(form, *arguments)
        return jnp.sum(slopes * outputs) + jnp.sum(mean * var), (outputs, mean, var)

    def found(normalize: Callable[..., Any], *arguments: Any) -> Any:
        values = functools.partial(total, normalize)
        numbers = range(len(arguments))
        return jax.jit(jax.grad(values, tuple(numbers), has_aux=True))(*arguments)

    split = jax.device_put(inputs, sharded(data_mesh()))
    (of_inputs, _, *rest), outputs = found(
        batch_norm._batch_norm, split, shift, scale, bias
    )
    expected = found(batch_norm._plain, inputs, scale, bias)
    pairs = zip(
        jax.tree.leaves(((of_inputs, *rest), outputs)),
        jax.tree.leaves(expected),
        strict=True,
    )
    return [float(jnp.max(jnp.abs(a - b))) for a, b in pairs]


def as_on_accelerators(*operands: Any, default: Any, **_: Any) -> Any:
    return default(*operands)


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    usual = helpers.USUAL_COMPILATION
    return json.loads(helpers.run_on_devices(__file__, count=DEVICES, **usual))


@pytest.mark.parametrize("name", CASES)
def test_a_layer_and_pass_is_one_wait_and_the_gradients_another(counts, name):
    """No more than that; another XLA may merge more."""
    _, _, passes, descents, besides = CASES[name]
    assert counts[name][0] <= 2 * LAYERS * passes + descents + besides


@pytest.mark.parametrize("name", ["st", "sam", "at"])
def test_devices_send_two_sums_a_channel_and_the_other_gradients(counts, name):
    _, _, passes, descents, _ = CASES[name]
    metrics = 2 * 4
    sent = passes * NORM_BYTES + descents * 4 * PARAMETERS + metrics
    assert counts[name][1] <= sent


def test_a_batch_split_over_devices_is_normalized_as_by_the_formulas(counts):
    assert len(counts["errors"]) == 6
    assert max(counts["errors"]) < 1e-12


def test_groups_of_one_device_leave_the_gradients_alone_to_wait_for(counts):
    assert counts["groups of a device"][0] == 2 < counts["sam"][0]


def test_no_process_waits_for_the_line_of_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "broadcast_from_primary", None)
    path = tmp_path / "metrics.jsonl"
    with log.RunFolder(tmp_path) as of_primary, log.RunFolder(tmp_path) as other:
        for each in (of_primary, other):
            monkeypatch.setattr(log, "is_primary", lambda each=each: each is of_primary)
            each.append({"epoch": 1})
            assert each.lines == [{"epoch": 1}]
    assert helpers.read_lines(path) == [{"epoch": 1}]


if __name__ == "__main__":
    lax.platform_dependent = as_on_accelerators
    found: dict[str, Any] = {name: count(name) for name in CASES}
    with jax.enable_x64(True):
        print(json.dumps(found | {"errors": errors()}))
