"""Quick compilation, and the order of the tests: what takes long begins first.

Workers take whole modules (`--dist=loadfile` in the Makefile), so what the tests of one
share is made once. With the short ones left for the end, all are busy to the end.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from samrobust.system.runtime import collect_garbage_seldom

# Collected, it would be on the path of all tests, before the real client.
collect_ignore = ["stand_ins"]
collect_garbage_seldom()
# Images of containers forbid it; then each of the many processes that tests start would
# compile all of this package.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# PyTorch's threads wait for each other busily, and lose time on networks this small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Networks this small are compiled for longer than they run: XLA optimizes little here
# and in the processes that tests start, and emits loops as LLVM's without MLIR's
# detour, in one piece. Half of all time would go there otherwise. A test that looks at
# the programs themselves undoes it (`helpers.usual_compilation`, `USUAL_COMPILATION`).
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

# By the time they take on two cores, from a minute to ten seconds.
_LONG = (
    "test_launch_slurm",
    "test_processes_end",
    "test_launch_tpu",
    "test_processes",
    "test_sharpness_contract",
    "test_attack_contract",
    "test_training_loop",
    "test_sanity",
    "test_bench",
    "test_parallel",
    "test_resume",
    "test_theory",
    "test_hostile_values",
    "test_own_code",
    "test_readme",
    "test_autoattack",
    "test_launch_local",
    "test_damage",
    "test_lockstep",
    "test_m_sharpness",
    "test_against_torch",
    "test_examples",
    "test_float64",
    "test_training_networks",
    "test_attacks",
    "test_launch_k8s",
    "test_autoattack_against_upstream",
    "test_phases",
    "test_flatness",
    "test_collectives",
    "test_table",
    "test_trunks",
    "test_flatness_study",
    "test_minimal_attacks",
    "test_square",
    "test_bench_aot",
    "test_apgd",
    "test_models",
    "test_methods_against_torch",
    "test_adversarial",
    "test_evaluation",
    "test_interchange",
    "test_sharpness",
    "test_campaign",
)


@pytest.fixture(scope="module")
def programs_made_once() -> Iterator[None]:
    """For modules that run one config again and again."""
    import helpers

    with helpers.programs_made_once():
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Returns two more than there are cores: the tests of launchers mostly wait."""
    return (os.cpu_count() or 1) + 2


def pytest_collection_modifyitems(items: list[Any]) -> None:
    ranks = {name: rank for rank, name in enumerate(_LONG)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))
