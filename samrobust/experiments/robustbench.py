"""A folder that RobustBench's maintainers can load: network, weights and claim.

RobustBench attacks models that take pixels in [0, 1], so the normalisation is inside;
its models are PyTorch's. The claim has the fields of its `model_info`, where a null is
printed as a word or taken for "no": of what a run cannot know, texts are empty and
other fields left out, to be filled in by hand. Robust accuracy is claimed where all
test images were attacked.
"""

import pathlib
from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType
from typing import Any

import numpy as np

from samrobust.experiments.building import load_facts
from samrobust.models.torch.files import torch_bytes
from samrobust.models.torch.weights import Weights
from samrobust.system.files import read_json_lines, write_bytes, write_json, write_text
from samrobust.types import Config

__all__ = ["find_evaluation", "model_info", "write_bundle"]


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
    code = resources.files("samrobust.experiments") / "robustbench_model.txt"
    lines = read_json_lines(workdir / "evaluations.jsonl")
    origin = weights.metadata["origin"]
    found = find_evaluation(lines, which, config.model.dtype, origin)
    full = load_facts(config).num_test
    evaluation = found if found and found["num_test"] == full else None
    info = model_info(config, weights, evaluation)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "model.pt", content)
    write_text(folder / "model.py", code.read_text(encoding="utf-8"))
    write_json(folder / "model_info.json", info)
    write_text(folder / "README.md", _readme(config, which, found, info))


def _with_normalisation(weights: Weights) -> dict[str, np.ndarray]:
    """All under `model.`, and mean and standard deviation as buffers [1, C, 1, 1]."""
    channels = weights.tensors["conv1.weight"].shape[1]
    normalisation = {}
    for name in ("mean", "std"):
        values = np.asarray(weights.metadata[name], np.float32)
        broadcast = np.broadcast_to(values, (channels,))
        normalisation[name] = broadcast.reshape(1, channels, 1, 1)
    return normalisation | {f"model.{n}": t for n, t in weights.tensors.items()}


def model_info(
    config: Config, weights: Weights, evaluation: dict[str, Any] | None
) -> dict[str, Any]:
    """RobustBench's fields, and under `samrobust` where the network comes from.

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
    lines: list[dict[str, Any]],
    which: str,
    dtype: str,
    origin: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any] | None:
    """The evaluation of this checkpoint by the standard AutoAttack; or None.

    On test images, under at least one attack and in float32, as the bundle computes:
    the one on most images, and of those the newest. `dtype` is that of lines which name
    none; a line that names a `step` or an `identity` must name those of `origin`.
    """

    def counts(line: dict[str, Any]) -> bool:
        wanted = {
            "attack": "autoattack",
            "version": "standard",
            "split": "test",
            "checkpoint": which,
        }
        evaluation = line.get("evaluation")
        return (
            isinstance(evaluation, dict)
            and all(evaluation.get(n) == value for n, value in wanted.items())
            and line.get("dtype", dtype) == "float32"
            and isinstance(line.get("num_test"), int)
            and isinstance(line.get("accuracy"), dict)
            and "natural" in line["accuracy"]
            and bool(_columns(line))
            and all(
                None in (line.get(n), origin.get(n)) or line[n] == origin[n]
                for n in ("step", "identity")
            )
        )

    newest_first = filter(counts, reversed(lines))
    return max(newest_first, key=lambda line: line["num_test"], default=None)


def _columns(line: dict[str, Any]) -> list[str]:
    return [name for name in line["accuracy"] if name != "natural"]


def _claim(evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """Radius and accuracies; empty where nothing is claimed."""
    if evaluation is None:
        return {}
    columns, accuracy = _columns(evaluation), evaluation["accuracy"]
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


def _readme(
    config: Config, which: str, found: dict[str, Any] | None, info: dict[str, Any]
) -> str:
    by_hand = [name for name in _FIELDS if info.get(name, "") == ""]
    return _README.format(
        label=config.label,
        dataset=config.data.name,
        which=which,
        step=info["samrobust"]["step"],
        row=config.row,
        seed=config.seed,
        architecture=info["architecture"],
        claims=_claims_in_words(found, which, load_facts(config).num_test),
        by_hand=", ".join(f"`{name}`" for name in by_hand),
    )


def _claims_in_words(found: dict[str, Any] | None, which: str, full: int) -> str:
    if found is None or found["num_test"] != full:
        command = f"samrobust evaluate --attack=autoattack --checkpoint={which}"
        lacking = "has not been evaluated by the standard AutoAttack"
        if found is not None:
            count = found["num_test"]
            lacking = f"was evaluated on {count} of the {full} test images alone"
        return (
            f"None: the run's {which} checkpoint {lacking}.\n"
            f"Run `{command}` and export again."
        )
    cells = (f"* {name}: {value:.2f} %" for name, value in found["accuracy"].items())
    origin = found["provenance"]
    return "\n".join(
        [
            f"The standard AutoAttack of samrobust, all {full} test images, seed "
            f"{found['seed']}:",
            "",
            *cells,
            "",
            f"Measured {origin['date']} on {origin['device']}, commit "
            f"{origin['commit']}, by `{origin['command']}`.",
        ]
    )


_USUAL = ("linf 8/255", "l2 127.5/255")
_FIELDS = (  # RobustBench's
    *("link", "name", "authors", "additional_data", "venue"),
    *("eps", "clean_acc", "autoattack_acc", "reported"),
)
_README = """\
# {label} on {dataset}

{architecture}, trained by samrobust: row `{row}`, seed {seed}, the {which} checkpoint,
step {step}.

* `model.py`: the network in PyTorch and `load_model`; it needs nothing else.
* `model.pt`: the state dict, with mean and standard deviation of the pixels inside.
* `model_info.json`: the claim, with RobustBench's fields.

    from model import load_model
    network = load_model("model.pt")  # images [B, C, H, W] in [0, 1] -> logits [B, K]

## Robust accuracy

{claims}

## To be filled in by hand

In `model_info.json`: {by_hand}; `unreliable` only if it is; and `name` as the title of
the paper.
"""
