"""How often the devices of one run wait for each other in a training step.

Counted in the programs that XLA makes for eight virtual devices, by this file as a
script; what a loop holds counts once. Ceilings: another XLA may merge more of them.
"""

import json
import os
import re
import subprocess
import sys
from typing import Any

import helpers
import jax
import pytest

from samrobust.experiments import building
from samrobust.system.distributed import data_mesh, replicated
from samrobust.system.files import MetricsLog
from samrobust.training import log
from samrobust.training.epoch import EpochRunner
from samrobust.training.fit import fresh_carry

BATCH, DEVICES = 16, 8
# Row, size of BatchNorm's groups (0: the global batch), all-reduces.
CASES = [("st", 0, 17), ("st", BATCH // DEVICES, 1), ("sam,rho=0.2", 2, 2)]
_COLLECTIVE = r" (?:all-\w+|reduce-scatter|collective-\w+)(?:-start)?\("


def count(row: str, group: int) -> int:
    """The collective operations in the program of one step."""
    sizes = {"training.batch_size": BATCH, "model.batch_norm_group": group}
    config = helpers.make_config(row, sizes)
    dataset, mesh = helpers.load_data(config), data_mesh()
    plan = building.make_plan(config, len(dataset.train))
    method = building.make_method(config, dataset, plan.num_steps)
    key = jax.random.key(0)
    runner = EpochRunner(
        *(method.train_step, plan, dataset.train),
        padding=0,
        flip=False,
        mesh=mesh,
        key=key,
    )
    begin = fresh_carry(method, BATCH, dataset.image_shape)
    carry = jax.jit(begin, out_shardings=replicated(mesh))(key)
    program: Any = runner.compile(plan.chunks()[0], [carry])
    return len(re.findall(_COLLECTIVE, program.as_text()))


@pytest.fixture(scope="module")
def counts() -> list[int]:
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": f"{DEVICES}"}
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, **devices, **helpers.USUAL_COMPILATION},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_devices_wait_for_each_other_no_more_often_than_this(counts, case):
    row, group, ceiling = CASES[case]
    assert 1 <= counts[case] <= ceiling, (row, group)


def test_groups_of_one_device_leave_the_gradients_alone_to_wait_for(counts):
    whole, groups, _ = counts
    assert groups == 1 < whole


def test_no_process_waits_for_the_line_of_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "broadcast_from_primary", None)
    path = tmp_path / "metrics.jsonl"
    with log.RunFolder(tmp_path) as of_primary, log.RunFolder(tmp_path) as other:
        of_primary._log = MetricsLog(path, [])
        for each in (of_primary, other):
            each.append({"epoch": 1})
            assert each.lines == [{"epoch": 1}]
    assert helpers.read_lines(path) == [{"epoch": 1}]


if __name__ == "__main__":
    print(json.dumps([count(row, group) for row, group, _ in CASES]))
