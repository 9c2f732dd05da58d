"""A folder that RobustBench's maintainers can load: network, weights and claim.

RobustBench attacks models that take pixels in [0, 1], so the normalization is inside;
its models are PyTorch's. The claim has the fields of its `model_info`, where a null is
printed as a word or taken for "no": of what a run cannot know, texts are empty and
other fields left out, to be filled in by hand. Robust accuracy is claimed where all
test images were attacked.
"""

import pathlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np

from samrobust.attacks import ATTACKS_VERSION
from samrobust.experiments.building import load_facts
from samrobust.experiments.reporting.results import attacks_version, makers
from samrobust.experiments.workdir import read_evaluations
from samrobust.models.torch.files import torch_bytes
from samrobust.models.torch.weights import Weights
from samrobust.system.files import write_bytes, write_json, write_text
from samrobust.types import Config

__all__ = ["find_evaluation", "model_info", "with_normalization", "write_bundle"]

_USUAL = ("linf 8/255", "l2 127.5/255")
# RobustBench's fields that no evaluation knows.
_BY_HAND = ("link", "name", "authors", "additional_data", "venue", "reported")


def write_bundle(
    folder: pathlib.Path,
    weights: Weights,
    config: Config,
    workdir: pathlib.Path,
    which: str,
) -> None:
    """Writes `model.pt`, `model.py`, `model_info.json` and `README.md`.

    Args:
      folder: made if it is not there; files of these names are replaced, the claims
        last: a stopped export leaves none beside the weights of another network.
      weights: with all metadata.
      config: of the run.
      workdir: of the run; its `evaluations.jsonl` holds the numbers.
      which: the exported checkpoint, `last` or `best`.

    Raises:
      ValueError: if PyTorch is not installed.
    """
    content = torch_bytes(with_normalization(weights))
    texts = resources.files("samrobust.experiments")
    code = (texts / "robustbench_model.py").read_text(encoding="utf-8")
    readme = (texts / "robustbench_readme.txt").read_text(encoding="utf-8")
    lines = read_evaluations(workdir)
    origin = weights.metadata["origin"]
    found = find_evaluation(lines, which, config.model.dtype, origin)
    full = load_facts(config).num_test
    evaluation = found if found and found["num_test"] == full else None
    info = model_info(config, weights, evaluation)
    by_hand = [f"`{name}`" for name in _BY_HAND if info.get(name, "") == ""]
    readme = readme.format(
        **{**info, **origin, "checkpoint": which},
        claims=_claims_in_words(found, which, full),
        by_hand=", ".join(by_hand),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for claim in ("model_info.json", "README.md"):
        (folder / claim).unlink(missing_ok=True)
    write_bytes(folder / "model.pt", content)
    write_text(folder / "model.py", code)
    write_json(folder / "model_info.json", info)
    write_text(folder / "README.md", readme)


def with_normalization(weights: Weights) -> dict[str, np.ndarray]:
    """Returns all under `model.`, and mean and std as buffers [1, C, 1, 1]."""
    shape = (1, weights.tensors["conv1.weight"].shape[1], 1, 1)
    tensors = {f"model.{name}": tensor for name, tensor in weights.tensors.items()}
    for name in ("mean", "std"):
        values = np.asarray(weights.metadata[name], np.float32).reshape(1, -1, 1, 1)
        tensors[name] = np.broadcast_to(values, shape).copy()
    return tensors


def model_info(
    config: Config, weights: Weights, evaluation: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns RobustBench's fields, and in `samrobust` where the network comes from.

    Args:
      config: of the run.
      weights: with all metadata.
      evaluation: a line of `evaluations.jsonl` on all test images, or None: then
        nothing is claimed.

    Returns:
      The fields; radii and accuracies in percent are strings, as there: `8/255` for
      l-inf, `0.5` for l2. Of several columns under attack the claim is the radius that
      RobustBench uses, or else the first. Of an imported network nothing is said of the
      data that it was trained on.
    """
    width, blocks = weights.metadata["width"], list(weights.metadata["blocks"])
    is_18 = (width, blocks) == (64, [2, 2, 2, 2])
    architecture = "PreActResNet-18" if is_18 else f"PreActResNet {width} {blocks}"
    origin = weights.metadata["origin"]
    return {
        "link": "",
        "name": f"A {architecture}: {config.label}",
        "authors": "",
        **({} if origin["imported"] else {"additional_data": False}),
        "number_forward_passes": 1,
        "dataset": config.data.name,
        "venue": "",
        "architecture": architecture,
        **_claim(evaluation),
        "samrobust": origin,
    }


def find_evaluation(
    lines: list[dict[str, Any]], which: str, dtype: str, origin: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Returns the evaluation of this checkpoint by the standard AutoAttack; or None.

    On test images, under at least one attack of today's version and in float32, as the
    bundle computes: the one on most images, and of those the newest. `dtype` is that of
    lines which name none; a line that names a `step`, an `identity` or a `network` must
    name those of `origin`.
    """
    wanted = {
        "attack": "autoattack",
        "version": "standard",
        "split": "test",
        "checkpoint": which,
    }

    def counts(line: dict[str, Any]) -> bool:
        evaluation, accuracy = line.get("evaluation"), line.get("accuracy")
        return (
            isinstance(evaluation, dict)
            and evaluation.items() >= wanted.items()
            and line.get("dtype", dtype) == "float32"
            and attacks_version(line) == ATTACKS_VERSION
            and isinstance(line.get("num_test"), int)
            and isinstance(accuracy, dict)
            and "natural" in accuracy
            and len(accuracy) > 1
            and all(
                None in (line.get(n), origin.get(n)) or line[n] == origin[n]
                for n in ("step", "identity", "network")
            )
        )

    newest_first = filter(counts, reversed(lines))
    return max(newest_first, key=lambda line: line["num_test"], default=None)


def _claim(evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """Returns radius and accuracies; empty where nothing is claimed."""
    if evaluation is None:
        return {}
    accuracy = evaluation["accuracy"]
    columns = [name for name in accuracy if name != "natural"]
    column = next((name for name in _USUAL if name in columns), columns[0])
    norm, radius = column.split()
    if norm == "l2":
        radius = f"{float(radius.removesuffix('/255')) / 255:g}"
    return {
        "eps": radius,
        "clean_acc": f"{accuracy['natural']:.2f}",
        "autoattack_acc": f"{accuracy[column]:.2f}",
        "footnote": f"Robust accuracy at {norm} {radius} by samrobust's AutoAttack.",
    }


def _claims_in_words(found: dict[str, Any] | None, which: str, full: int) -> str:
    if found is None or found["num_test"] != full:
        command = "samrobust evaluate --attack=autoattack --workdir=RUN"
        command += f" --checkpoint={which}"
        lacking = "has not been evaluated by the standard AutoAttack"
        if found is not None:
            count = found["num_test"]
            lacking = f"was evaluated on only {count} of the {full} test images"
        return (
            f"None: the run's {which} checkpoint {lacking}.\n"
            f"Run `{command}` and export again."
        )
    cells = [f"* {name}: {value:.2f} %\n" for name, value in found["accuracy"].items()]
    how = "{which} {date} on {device}, commit {commit}, by `{command}`."
    told = [
        how.format(which=f"{column} was measured" if column else "Measured", **made)
        for column, made in makers(found).items()
    ]
    return (
        f"The standard AutoAttack of samrobust, all {full} test images, seed "
        f"{found['seed']}:\n\n{''.join(cells)}\n{' '.join(told)}"
    )
