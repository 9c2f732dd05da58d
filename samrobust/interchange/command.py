"""`samrobust export` and `samrobust import`: a run's network to a file and back."""

import argparse
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from samrobust import building, configuration
from samrobust.checks import check
from samrobust.claims import claim
from samrobust.data import Dataset
from samrobust.files import WorkdirError, write_json
from samrobust.interchange.names import from_tensors, infer_architecture, to_tensors
from samrobust.interchange.robustbench import write_bundle
from samrobust.interchange.weights import (
    SUFFIXES,
    Weights,
    import_torch,
    read_weights,
    write_pytorch,
    write_safetensors,
)
from samrobust.provenance import provenance
from samrobust.training import load_network, save_variables
from samrobust.types import Config
from samrobust.validation import validate
from samrobust.workdir import config_of_run

__all__ = ["export_command", "import_command"]

# What a workdir of a run holds, from its first moments on.
_OF_A_RUN = ("config.json", "checkpoints", "metrics.jsonl", "result.json")


def export_command(
    arguments: argparse.Namespace, overrides: Sequence[str], stop: Any
) -> int:
    """Writes the network of a run as other tools read it.

    Raises:
      ValueError: for a workdir without a run, an output of another suffix, or where
        PyTorch is needed and not installed.
      CheckpointError: if the run has no intact checkpoint of that kind.
    """
    del stop  # it takes seconds
    check(
        not overrides,
        "no --config overrides for export",
        "The run's own config is used.",
        overrides=list(overrides),
    )
    workdir, output = pathlib.Path(arguments.workdir), pathlib.Path(arguments.output)
    _check_output(arguments.format, output)
    config = config_of_run(workdir)
    which = arguments.checkpoint or config.evaluation.checkpoint
    dataset = building.load_data(config)
    weights = _weights_of(config, dataset, workdir, which)
    output.parent.mkdir(parents=True, exist_ok=True)
    if arguments.format == "robustbench":
        write_bundle(output, weights, config, workdir, which)
    elif arguments.format == "pytorch":
        write_pytorch(output, weights)
    else:
        write_safetensors(output, weights)
    Console().print(
        f"Wrote the {which} checkpoint of {workdir} to {output}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _check_output(kind: str, output: pathlib.Path) -> None:
    if kind != "safetensors":
        import_torch(f"write --format={kind}")
    if kind == "robustbench":
        check(
            not output.is_file(), "a folder for the bundle", "", **{"--output": output}
        )
        return
    suffixes = SUFFIXES[kind]
    check(
        output.suffix in suffixes and not output.is_dir(),
        f"--output=NAME{' or NAME'.join(suffixes)} with --format={kind}",
        output=str(output),
    )


def _weights_of(
    config: Config, dataset: Dataset, workdir: pathlib.Path, which: str
) -> Weights:
    model = building.make_model(config, dataset)
    variables = load_network(config, dataset, workdir, which).variables
    metadata = {
        "mean": list(model.mean),
        "std": list(model.std),
        "num_classes": model.num_classes,
        "width": model.width,
        "blocks": list(model.blocks),
    }
    return Weights(to_tensors(variables), metadata)


def import_command(
    arguments: argparse.Namespace, overrides: Sequence[str], stop: Any
) -> int:
    """Makes a workdir of a file of weights, like that of a run before its first step.

    Raises:
      ValueError: for a file that is not of such a network; names the tensors.
      WorkdirError: if the workdir holds a run already, or cannot be written.
      CheckpointError: if the checkpoint cannot be written.
    """
    del stop  # it takes seconds
    source, workdir = pathlib.Path(arguments.input), pathlib.Path(arguments.workdir)
    _check_free(workdir)
    weights = read_weights(source)
    config = configuration.load_config(arguments.config, overrides)
    with config.unlocked():
        _describe(config, weights, arguments.dataset)
    validate(config)
    dataset = building.load_data(config)
    model = building.make_model(config, dataset)
    variables = from_tensors(weights.tensors, model, dataset.image_shape[-1])
    note = {
        "source": source.name,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "metadata": weights.metadata,
        "provenance": provenance(),
    }
    with claim(workdir):
        _check_free(workdir)
        save_variables(config, dataset, workdir, variables)
        write_json(workdir / "import.json", note)
        write_json(workdir / "config.json", config.to_dict())
    where = "the file" if "mean" in weights.metadata else f"the data set {dataset.name}"
    Console().print(
        f"Imported {source} to {workdir}: width {model.width}, blocks "
        f"{list(model.blocks)}, {model.num_classes} classes; mean and std of "
        f"{'--config.model' if _is_given(overrides) else where}.\n"
        f"Next: samrobust evaluate --workdir={workdir}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _is_given(overrides: Sequence[str]) -> bool:
    return any(item.startswith("--config.model.mean=") for item in overrides)


def _check_free(workdir: pathlib.Path) -> None:
    found = [name for name in _OF_A_RUN if (workdir / name).exists()]
    if found:
        message = (
            f"Expected a --workdir without a run, got workdir={str(workdir)!r} with "
            f"{', '.join(found)}. Choose another."
        )
        raise WorkdirError(message)


def _describe(config: Config, weights: Weights, dataset: str | None) -> None:
    """Writes what the file says of its network into the config."""
    if dataset is not None:
        config.data.name = dataset
    architecture = infer_architecture(weights.tensors)
    for name, value in architecture.items():
        told = list(value) if name == "blocks" else value
        claimed = weights.metadata.get(name, told)
        check(claimed == told, f"{name}={told} as in the tensors", **{name: claimed})
    config.model.width = architecture["width"]
    config.model.blocks = architecture["blocks"]
    for name in ("mean", "std"):
        if config.model[name] is None and name in weights.metadata:
            config.model[name] = tuple(weights.metadata[name])
    config.label = f"Imported {config.label}"
