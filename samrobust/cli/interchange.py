"""`samrobust export` and `samrobust import`: a run's network to a file and back."""

import argparse
import hashlib
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from samrobust.checks import check
from samrobust.experiments import building, configuration
from samrobust.experiments.components import model_fields, takes
from samrobust.experiments.identity import changed_fields
from samrobust.experiments.networks import load_network, save_variables
from samrobust.experiments.reporting.console import make_console
from samrobust.experiments.robustbench import write_bundle
from samrobust.experiments.validation import validate
from samrobust.experiments.workdir import config_of_run
from samrobust.models import PreActResNet
from samrobust.models.torch.files import import_torch
from samrobust.models.torch.names import from_tensors, infer_architecture, to_tensors
from samrobust.models.torch.weights import (
    SUFFIXES,
    Weights,
    read_weights,
    write_pytorch,
    write_safetensors,
)
from samrobust.system.claims import claim
from samrobust.system.files import WorkdirError, glance, write_json
from samrobust.system.provenance import provenance
from samrobust.training.checkpoint import CheckpointError, Checkpoints
from samrobust.training.log import checkpoint_folder
from samrobust.types import Config

__all__ = ["export_command", "import_command"]

# What training leaves in a workdir; and what a network's evaluations do.
_OF_TRAINING = ("metrics.jsonl", "result.json", "checkpoints/best")
_OF_EVALUATIONS = ("evaluations.jsonl", "autoattack")


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
    weights = _weights_of(config, workdir, which, arguments.step)
    output.parent.mkdir(parents=True, exist_ok=True)
    if arguments.format == "robustbench":
        check(
            config.model.name == "preact_resnet",
            "model.name=preact_resnet with --format=robustbench",
            "Its PyTorch code is that network's. Use --format=safetensors.",
            **{"model.name": config.model.name},
        )
        write_bundle(output, weights, config, workdir, which)
    elif arguments.format == "pytorch":
        write_pytorch(output, weights)
    else:
        write_safetensors(output, weights)
    _say(
        f"Wrote the {which} checkpoint of {workdir}, of step "
        f"{weights.metadata['origin']['step']}, to {output}"
    )
    return 0


def _say(text: str) -> None:
    make_console().print(text, soft_wrap=True)


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
    config: Config, workdir: pathlib.Path, which: str, step: int | None
) -> Weights:
    facts = building.load_facts(config)
    model = building.make_model(config, facts)
    network = load_network(config, facts, workdir, which, step=step)
    imported = glance(workdir / "import.json")
    origin = {
        "label": config.label,
        "row": config.row,
        "seed": config.seed,
        "checkpoint": which,
        "step": network.step,
        "identity": network.identity.hash,
        "imported": {n: imported[n] for n in ("source", "sha256") if n in imported},
    }
    section = config.model
    own = {name: section[name] for name in model_fields(section.name)}
    if not isinstance(model, PreActResNet):
        own = {"model": {"name": section.name, **own}}
    metadata = {
        "mean": list(section.mean or facts.mean),
        "std": list(section.std or facts.std),
        "num_classes": facts.num_classes,
        **json.loads(json.dumps(own)),
        "origin": origin,
    }
    return Weights(to_tensors(network.variables, model), metadata)


def import_command(
    arguments: argparse.Namespace, overrides: Sequence[str], stop: Any
) -> int:
    """Makes a workdir of a file of weights, like that of a run before its first step.

    A second time it finds all done; after a kill at any moment it begins anew.

    Raises:
      ValueError: for a file that is not of such a network; names the tensors.
      WorkdirError: if the workdir holds another run, or cannot be written.
      CheckpointError: if the checkpoint cannot be written.
    """
    del stop  # it takes seconds
    source, workdir = pathlib.Path(arguments.input), pathlib.Path(arguments.workdir)
    weights = read_weights(source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    config = configuration.load_config(arguments.config, overrides)
    with config.unlocked():
        _describe(config, weights, arguments.dataset)
    validate(config)
    facts = building.load_facts(config)
    model = building.make_model(config, facts)
    variables = from_tensors(weights.tensors, model, facts.image_shape)
    note = {
        "source": source.name,
        "sha256": digest,
        "metadata": weights.metadata,
        "notes": list(weights.notes),
        "provenance": provenance(),
    }
    _is_done(workdir, digest, config)
    with claim(workdir):
        done = _is_done(workdir, digest, config)
        if not done:
            # A kill at any moment leaves what the same command, or the import of
            # another file, takes for its own: the config, written last, ends it.
            if (workdir / "checkpoints").exists():
                shutil.rmtree(workdir / "checkpoints")
            write_json(workdir / "import.json", note)
            save_variables(config, facts, workdir, variables, digest)
        given = json.loads(config.to_json_best_effort())
        if glance(workdir / "config.json") != given:
            write_json(workdir / "config.json", given)
    where = "the file"
    if "mean" not in weights.metadata:
        where = f"the data set {config.data.name}"
    own = {name: config.model[name] for name in model_fields(config.model.name)}
    shown = [f"{n} {list(v) if isinstance(v, tuple) else v}" for n, v in own.items()]
    _say(
        f"{'Already imported' if done else 'Imported'} {source} to {workdir}: "
        f"{', '.join([*shown, f'{facts.num_classes} classes'])}; mean and "
        f"std of {'--config.model' if _is_given(overrides) else where}."
    )
    for remark in weights.notes:
        _say(remark)
    _say(f"Next: samrobust evaluate --workdir={workdir}")
    return 0


def _is_given(overrides: Sequence[str]) -> bool:
    return any(item.startswith("--config.model.mean=") for item in overrides)


def _is_done(workdir: pathlib.Path, digest: str, config: Config) -> bool:
    """Whether the workdir is what this import makes of it.

    Raises:
      WorkdirError: if it holds another run, or what one has left.
    """

    def found(*names: str) -> list[str]:
        return [name for name in names if (workdir / name).exists()]

    with Checkpoints(checkpoint_folder(workdir, "last")) as checkpoints:
        step = checkpoints.latest_step()
    imported = glance(workdir / "import.json").get("sha256")
    is_whole = (workdir / "config.json").exists()
    others = [
        *found(*_OF_TRAINING),
        *([f"a checkpoint of step {step}"] if step else []),
    ]
    if not is_whole:
        others += found(
            *_OF_EVALUATIONS, *(["checkpoints"] if imported is None else [])
        )
    elif imported != digest:
        others += found("config.json", "import.json", "checkpoints")
    if others:
        message = (
            f"Expected a --workdir without a run, got workdir={str(workdir)!r} with "
            f"{', '.join(others)}. Choose another."
        )
        raise WorkdirError(message)
    if is_whole:
        stored = config_of_run(workdir)
        changed = changed_fields(stored.to_dict(), config.to_dict())
        if changed:
            told = "; ".join(
                f"{n} was {a!r}, is {b!r}" for n, (a, b) in changed.items()
            )
            message = (
                f"Expected the config of this file's import in {workdir}, got another: "
                f"{told}. Choose another --workdir, or restore the field."
            )
            raise WorkdirError(message)
    return is_whole and step == 0 and _is_intact(workdir, config)


def _is_intact(workdir: pathlib.Path, config: Config) -> bool:
    """Whether the network is there that `import.json` names."""
    try:
        load_network(config, building.load_facts(config), workdir, "last")
    except CheckpointError:
        return False
    return True


def _describe(config: Config, weights: Weights, dataset: str | None) -> None:
    """Writes what the file says of its network into the config."""
    if dataset is not None:
        config.data.name = dataset
    if config.model.name == "preact_resnet":
        architecture = infer_architecture(weights.tensors)
        for name, value in architecture.items():
            told = list(value) if name == "blocks" else value
            claimed = weights.metadata.get(name, told)
            check(
                claimed == told, f"{name}={told} as in the tensors", **{name: claimed}
            )
        config.model.width = architecture["width"]
        config.model.blocks = architecture["blocks"]
    for name in ("mean", "std"):
        is_open = takes(config.model.name, name) and config.model[name] is None
        if is_open and name in weights.metadata:
            config.model[name] = tuple(weights.metadata[name])
    config.label = f"Imported {config.label}"
