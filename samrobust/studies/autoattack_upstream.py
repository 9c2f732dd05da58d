"""Our AutoAttack beside the authors', on networks of finished runs: answer and time.

    python -m samrobust.studies.autoattack_upstream --norm=linf --epsilon=32 \
        --output=results/autoattack/upstream.jsonl RUN RUN ...

Needs torch and pyautoattack (0.2.0, the authors' sources as a package). Both attack the
same images with the same weights, in float32, on the same cores or GPU (with TF32 in
convolutions, the default of both), one after the other, run by run; who begins changes
from run to run. Each works in a process of its own, ours with the settings of the
`samrobust` command. Our time includes compilation, which is paid once for all runs, as
the first lines show. A line of JSON for each run.
"""

import argparse
import concurrent.futures
import functools
import io
import json
import logging
import multiprocessing
import pathlib
import time
from typing import Any, Literal

import jax
import numpy as np
import torch
from pyautoattack import AutoAttack
from torch import nn

from samrobust.data import Dataset, Split
from samrobust.evaluation import make_autoattack_evaluator
from samrobust.experiments import building
from samrobust.experiments.interchange import export_weights
from samrobust.experiments.networks import checkpoints_of, load_network
from samrobust.experiments.robustbench import with_normalization
from samrobust.experiments.robustbench_model import load_model
from samrobust.experiments.workdir import config_of_run
from samrobust.models.torch.files import torch_bytes
from samrobust.system.files import append_json_line
from samrobust.system.provenance import provenance
from samrobust.system.runtime import keep_freed_memory
from samrobust.types import Config

__all__ = ["main"]

_NORMS: dict[str, Literal["Linf", "L2"]] = {"linf": "Linf", "l2": "L2"}
_evaluators: dict[Any, Any] = {}  # by networks, of our process: each compiled once


def main() -> None:
    """Compares run by run; see the module."""
    parser = argparse.ArgumentParser(description="Our AutoAttack beside the authors'.")
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN")
    parser.add_argument("--norm", choices=tuple(_NORMS), required=True)
    parser.add_argument("--epsilon", type=float, required=True, help="in 1/255")
    parser.add_argument("--num-examples", type=int, help="default: the run's")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    process = functools.partial(
        concurrent.futures.ProcessPoolExecutor,
        *(1, multiprocessing.get_context("spawn")),
    )
    with process(keep_freed_memory) as our_process, process() as their_process:
        sides = [("ours", our_process, _ours), ("upstream", their_process, _theirs)]
        for number, run in enumerate(arguments.runs):
            found = {
                name: process.submit(attack, run, arguments).result()
                for name, process, attack in sides[:: 1 if number % 2 == 0 else -1]
            }
            line = _line(run, arguments, found)
            append_json_line(arguments.output, line | {"provenance": provenance()})
            print(json.dumps(line))


def _ours(run: pathlib.Path, arguments: argparse.Namespace) -> tuple[np.ndarray, float]:
    """Returns which images are still right, and the seconds that took."""
    config, dataset = _load(run, arguments)
    network = load_network(config, dataset, run, checkpoints_of(config)[0])
    if network.model not in _evaluators:
        attacks, size = building.autoattacks(config), arguments.batch_size
        made = make_autoattack_evaluator(network.model, attacks, batch_size=size)
        _evaluators[network.model] = made
    evaluate = _evaluators[network.model]
    start = time.monotonic()
    outcome = evaluate(network.variables, dataset.test, jax.random.key(config.seed))
    (correct,) = list(outcome.correct.values())[1:]
    return correct, time.monotonic() - start


def _theirs(
    run: pathlib.Path, arguments: argparse.Namespace
) -> tuple[np.ndarray, float]:
    """Returns the same, from the authors' code."""
    config, dataset = _load(run, arguments)
    weights = export_weights(config, run, checkpoints_of(config)[0])
    model = load_model(io.BytesIO(torch_bytes(with_normalization(weights))))
    start = time.monotonic()
    correct = _upstream(model.to(_device()), dataset.test, arguments, config.seed)
    return correct, time.monotonic() - start


def _load(run: pathlib.Path, arguments: argparse.Namespace) -> tuple[Config, Dataset]:
    config = config_of_run(run)
    if arguments.num_examples is not None:
        config.data.test_size = arguments.num_examples
    config.model.dtype = "float32"
    config.evaluation.update(linf=(), l2=(), attack="autoattack")
    config.evaluation[arguments.norm] = (arguments.epsilon,)
    return config, building.load_data(config)


def _line(
    run: pathlib.Path,
    arguments: argparse.Namespace,
    found: dict[str, tuple[np.ndarray, float]],
) -> dict[str, Any]:
    config = config_of_run(run)
    correct = {name: which for name, (which, _) in found.items()}
    return {
        "row": config.row,
        "seed": config.seed,
        "norm": arguments.norm,
        "epsilon": arguments.epsilon,
        "num_test": len(correct["ours"]),
        "accuracy": {name: 100 * float(np.mean(v)) for name, v in correct.items()},
        "judged differently": int(np.sum(correct["ours"] != correct["upstream"])),
        "seconds": {name: seconds for name, (_, seconds) in found.items()},
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_device": _device(),
    }


def _device() -> str:
    """Returns PyTorch's name for the device that JAX computes on."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def _upstream(
    model: nn.Module, split: Split, arguments: argparse.Namespace, seed: int
) -> np.ndarray:
    logging.disable(logging.CRITICAL)
    attack = AutoAttack(
        model,
        norm=_NORMS[arguments.norm],
        eps=arguments.epsilon / 255,
        seed=seed,
        device=_device(),
    )
    pixels = split.images.astype(np.float32) / np.float32(255)
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    labels = torch.from_numpy(split.labels.astype(np.int64))
    attacked = attack.run_standard_evaluation(
        images, labels, batch_size=arguments.batch_size
    )
    attacked = attacked[0] if isinstance(attacked, tuple) else attacked
    batches = attacked.split(arguments.batch_size)
    with torch.no_grad():
        found = [model(batch.to(_device())).argmax(1).cpu() for batch in batches]
    return (torch.cat(found) == labels).numpy()


if __name__ == "__main__":
    main()
