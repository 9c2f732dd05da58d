"""Epochs of a row, as a run takes them, timed; and the bits at which they end.

    python launch/gpu_measure/epochs.py --config=FILE:ROW --output=FILE

By `samrobust.training.fit`, on made-up images, in memory alone unless there is a
workdir. It uses little of the package, so that with `PYTHONPATH` an older one is
measured alike.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import signal
import statistics
from typing import Any

import jax
import numpy as np

from samrobust.experiments import building, configuration
from samrobust.studies.bench.images import make_dataset
from samrobust.system.provenance import provenance
from samrobust.system.runtime import enable_compilation_cache, keep_freed_memory
from samrobust.training.fit import Progress, fit
from samrobust.training.log import RunFolder, RunLog

__all__ = ["COMMIT", "main"]

COMMIT = "COMMIT"  # a file of the bundle, beside another version of the package


def main() -> None:
    """Trains what the command line asks for, and writes what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--config", required=True)
    add("--output", type=pathlib.Path, required=True)
    add("--epochs", type=int, default=6)
    add("--workdir", type=pathlib.Path, help="for checkpoints, from which it resumes")
    add(
        "--kill",
        action="store_true",
        help="begin from nothing, die half-way by SIGKILL",
    )
    arguments, overrides = parser.parse_known_args()
    enable_compilation_cache()
    keep_freed_memory()
    config = configuration.load_config(arguments.config, overrides)
    training, data = config.training, config.data
    facts = building.load_facts(config)
    dataset = make_dataset(data.name, data.train_size or facts.num_train, 1)
    plan = building.make_plan(config, len(dataset.train))
    method = _make_method(config, dataset, plan.num_steps)
    half = plan.num_steps * arguments.epochs // 2
    steps: list[int] = []

    def on_progress(progress: Progress) -> None:
        steps.append(progress.step)
        if arguments.kill and progress.step > half:
            os.kill(os.getpid(), signal.SIGKILL)

    log = RunLog()
    if arguments.kill:
        shutil.rmtree(arguments.workdir, ignore_errors=True)
    if arguments.workdir:
        log = RunFolder(arguments.workdir, minutes=0.0)
    # An older package has no such field, and so no such argument.
    own: Any = {"deterministic": True} if training.get("deterministic") else {}
    result = fit(
        *(method, dataset.train),
        epochs=arguments.epochs,
        batch_size=training.batch_size,
        key=jax.random.key(config.seed),
        padding=data.padding,
        flip=data.flip,
        drop_remainder=training.drop_remainder,
        steps_per_call=training.steps_per_call,
        log=log,
        on_progress=on_progress,
        **own,
    )
    found: dict[str, Any] = {"digest": _digest(result.state), "began_at": steps[0]}
    if not arguments.workdir:  # else the time is that of a checkpoint after each call
        rates = [line["examples_per_second"] for line in log.lines[1:]]
        found |= {
            "step_seconds": result.step_seconds,
            "images_per_second": statistics.median(rates),
            "epoch_seconds": [line["seconds"] for line in log.lines],
        }
    found["provenance"] = _provenance()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=1))


def _make_method(*arguments: Any) -> Any:
    """Makes a method as this version of the package does, or as an older one did."""
    if hasattr(building, "make_training"):
        return building.make_training(*arguments).method
    return getattr(building, "make_method")(*arguments)  # noqa: B009 - not of this one


def _provenance() -> dict[str, Any]:
    """Returns the provenance; of a bundle's other version, with its own commit."""
    told = pathlib.Path(building.__file__).parents[2] / COMMIT
    own = {"commit": told.read_text().strip()} if told.is_file() else {}
    return provenance() | own


def _digest(state: object) -> str:
    """Returns a checksum of all bits of a state."""
    sha256 = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(state)):
        sha256.update(np.ascontiguousarray(leaf).tobytes())
    return sha256.hexdigest()[:16]


if __name__ == "__main__":
    main()
