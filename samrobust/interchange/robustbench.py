"""A folder that RobustBench's maintainers can load: network, weights and claim.

RobustBench attacks models that take pixels in [0, 1], so the normalisation is inside;
its models are PyTorch's. The claim has the fields of its `model_info`; what a run
cannot know is null, to be filled in by hand.
"""

import pathlib
from importlib import resources
from typing import Any

import numpy as np

from samrobust.files import read_json_lines, write_bytes, write_json, write_text
from samrobust.interchange.weights import Weights, torch_bytes
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
    code = resources.files("samrobust.interchange") / "robustbench_model.txt"
    lines = read_json_lines(workdir / "evaluations.jsonl")
    evaluation = find_evaluation(lines, which, config.model.dtype)
    imported = (workdir / "import.json").exists()
    info = model_info(config, weights, evaluation, imported=imported)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "model.pt", content)
    write_text(folder / "model.py", code.read_text(encoding="utf-8"))
    write_json(folder / "model_info.json", info)
    write_text(folder / "README.md", _readme(config, which, evaluation, info))


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
    config: Config,
    weights: Weights,
    evaluation: dict[str, Any] | None,
    *,
    imported: bool,
) -> dict[str, Any]:
    """RobustBench's fields; None where a run cannot know.

    Args:
      config: of the run.
      weights: with all metadata.
      evaluation: a line of `evaluations.jsonl`, or None: then nothing is claimed.
      imported: whether the weights came from a file; then nothing is known of what
        they were trained on.

    Returns:
      The fields; accuracies in percent are strings with two digits, as there. Of
      several columns under attack the claim is linf 8/255, or else the first.
    """
    width, blocks = weights.metadata["width"], list(weights.metadata["blocks"])
    is_18 = (width, blocks) == (64, [2, 2, 2, 2])
    return {
        "link": None,
        "name": config.label,
        "authors": None,
        "additional_data": None if imported else False,
        "number_forward_passes": 1,
        "dataset": config.data.name,
        "venue": None,
        "architecture": "PreActResNet-18"
        if is_18
        else f"PreActResNet {width} {blocks}",
        **_claim(evaluation),
        "reported": None,
        "unreliable": None,
    }


def find_evaluation(
    lines: list[dict[str, Any]], which: str, dtype: str
) -> dict[str, Any] | None:
    """The evaluation of this checkpoint by the standard AutoAttack; or None.

    On test images, under at least one attack and in float32, as the bundle computes:
    the one on most images, and of those the newest. `dtype` is that of lines which name
    none.
    """

    def counts(line: dict[str, Any]) -> bool:
        evaluation = line["evaluation"]
        return (
            evaluation.get("attack") == "autoattack"
            and evaluation.get("version") == "standard"
            and evaluation["split"] == "test"
            and evaluation["checkpoint"] == which
            and line.get("dtype", dtype) == "float32"
            and bool(_columns(line))
        )

    newest_first = filter(counts, reversed(lines))
    return max(newest_first, key=lambda line: line["num_test"], default=None)


def _columns(line: dict[str, Any]) -> list[str]:
    return [name for name in line["accuracy"] if name != "natural"]


def _claim(evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """Radius and accuracies; the footnote says on how many images."""
    if evaluation is None:
        names = ("eps", "clean_acc", "autoattack_acc", "footnote")
        return dict.fromkeys(names)
    columns, accuracy = _columns(evaluation), evaluation["accuracy"]
    column = _USUAL if _USUAL in columns else columns[0]
    return {
        "eps": column.split()[1],
        "clean_acc": f"{accuracy['natural']:.2f}",
        "autoattack_acc": f"{accuracy[column]:.2f}",
        "footnote": f"{column}, {evaluation['num_test']} test images.",
    }


def _readme(
    config: Config, which: str, evaluation: dict[str, Any] | None, info: dict[str, Any]
) -> str:
    missing = ", ".join(f"`{name}`" for name, value in info.items() if value is None)
    return _README.format(
        label=config.label,
        dataset=config.data.name,
        which=which,
        row=config.row,
        seed=config.seed,
        architecture=info["architecture"],
        claims=_claims_in_words(evaluation, which),
        missing=missing,
    )


def _claims_in_words(evaluation: dict[str, Any] | None, which: str) -> str:
    if evaluation is None:
        return (
            f"None yet: the run's {which} checkpoint has not been evaluated by the "
            "standard AutoAttack.\nRun `samrobust evaluate --attack=autoattack "
            f"--checkpoint={which}` and export again."
        )
    cells = (
        f"* {name}: {value:.2f} %" for name, value in evaluation["accuracy"].items()
    )
    origin = evaluation["provenance"]
    return "\n".join(
        [
            "The standard AutoAttack of samrobust, "
            f"{evaluation['num_test']} test images, seed {evaluation['seed']}:",
            "",
            *cells,
            "",
            f"Measured {origin['date']} on {origin['device']}, commit "
            f"{origin['commit']}, by `{origin['command']}`.",
        ]
    )


_USUAL = "linf 8/255"
_README = """\
# {label} on {dataset}

{architecture}, trained by samrobust: row `{row}`, seed {seed}, the {which} checkpoint.

* `model.py`: the network in PyTorch and `load_model`; it needs nothing else.
* `model.pt`: the state dict, with mean and standard deviation of the pixels inside.
* `model_info.json`: the claim, with RobustBench's fields.

    from model import load_model
    network = load_model("model.pt")  # images [B, C, H, W] in [0, 1] -> logits [B, K]

## Robust accuracy

{claims}

## To be filled in by hand

In `model_info.json`: {missing}.
"""
