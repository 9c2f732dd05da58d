"""A folder that RobustBench's maintainers can load: network, weights and claim.

RobustBench attacks models that take pixels in [0, 1], so the normalisation is inside;
its models are PyTorch's. The claim has the fields of its `model_info`; what a run cannot
know is null, to be filled in by hand.
"""

import json
import pathlib
from importlib import resources
from typing import Any

import numpy as np

from samrobust.files import read_json_lines, write_bytes, write_json, write_text
from samrobust.interchange.weights import Weights, torch_bytes
from samrobust.types import Config

__all__ = ["model_info", "write_bundle"]


def write_bundle(
    folder: pathlib.Path,
    weights: Weights,
    config: Config,
    workdir: pathlib.Path,
    which: str,
) -> None:
    """Writes `model.pt`, `model.py`, `model_info.json` and `README.md`.

    Args:
      folder: made if it is not there; files of these names are replaced.
      weights: with all metadata.
      config: of the run.
      workdir: of the run; its `evaluations.jsonl` holds the numbers.
      which: the exported checkpoint, `last` or `best`.

    Raises:
      ValueError: if PyTorch is not installed.
    """
    content = torch_bytes(_with_normalisation(weights))
    code = resources.files("samrobust.interchange") / "robustbench_model.txt"
    info = model_info(config, weights, read_json_lines(workdir / "evaluations.jsonl"))
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "model.pt", content)
    write_text(folder / "model.py", code.read_text(encoding="utf-8"))
    write_json(folder / "model_info.json", info)
    write_text(folder / "README.md", _readme(config, which, info))


def _with_normalisation(weights: Weights) -> dict[str, np.ndarray]:
    """All under `model.`, and mean and standard deviation as buffers [1, C, 1, 1]."""
    channels = weights.tensors["conv1.weight"].shape[1]
    normalisation = {}
    for name in ("mean", "std"):
        values = np.asarray(weights.metadata[name], np.float32)
        broadcast = np.broadcast_to(values, (channels,))
        normalisation[name] = broadcast.reshape(1, channels, 1, 1)
    return normalisation | {f"model.{n}": t for n, t in weights.tensors.items()}
