"""`samrobust import`: a workdir made of a file of weights."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from samrobust.cli import flags

if TYPE_CHECKING:
    from samrobust.models.torch.weights import Weights
    from samrobust.types import Config

__all__ = ["ABOUT", "add_flags", "run"]


ABOUT = {
    "help": "a network from a .safetensors or .pth file, to evaluate",
    "description": "Makes a workdir of a file of weights, for `samrobust evaluate`. "
    "Width, blocks and classes are read from the tensors.",
    "epilog": "Any field: --config.model.mean='(0.5, 0.5, 0.5)'. See configs/base.py.",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    tensors = "only its tensors are read; none of its code runs"
    add("--input", **flags.FILE, required=True, help=tensors)
    add("--workdir", **flags.WORKDIR, required=True, help="a new one")
    judged = "how it is evaluated; default: %(default)s"
    add("--config", **flags.ONE_ROW, default="configs/cifar10.py:st", help=judged)
    names = ("cifar10", "cifar100", "digits")
    other = "default: the config's; any other: --config.data.name"
    add("--dataset", choices=names, help=other)


def run(arguments: argparse.Namespace, stop: Any) -> int:
    """Makes a workdir of a file of weights, like that of a run before its first step.

    Raises:
      ValueError: for a file that is not of such a network; names the tensors.

    And as `samrobust.experiments.interchange.import_weights`.
    """
    from samrobust.experiments import configuration
    from samrobust.experiments.building import load_facts
    from samrobust.experiments.components import model_fields, takes
    from samrobust.experiments.interchange import describe, import_weights
    from samrobust.experiments.reporting.console import make_console
    from samrobust.experiments.validation import validate
    from samrobust.models.torch.weights import read_weights

    del stop  # it takes seconds
    source, workdir = pathlib.Path(arguments.input), arguments.workdir
    weights = read_weights(source)
    overrides = list(arguments.overrides)
    if arguments.dataset is not None:
        overrides.append(f"--config.data.name={arguments.dataset}")
    config = configuration.load_config(arguments.config, overrides)
    origins = {
        name: _origin(name, config, weights, overrides)
        for name in ("mean", "std")
        if takes(config.model.name, name)
    }
    with config.unlocked():
        describe(config, weights)
    validate(config)
    done = import_weights(config, weights, source, workdir)
    fields = {name: config.model[name] for name in model_fields(config.model.name)}
    shown = [f"{n} {list(v) if isinstance(v, tuple) else v}" for n, v in fields.items()]
    shown.append(f"{load_facts(config).num_classes} classes")
    normalized = ", ".join(f"{name} of the {whose}" for name, whose in origins.items())
    told = "; ".join(filter(None, (", ".join(shown), normalized)))
    lines = (
        f"{'Already imported' if done else 'Imported'} {source} to {workdir}: {told}.",
        *weights.notes,
        f"Next: samrobust evaluate --workdir={workdir}",
    )
    make_console().print("\n".join(lines), soft_wrap=True)
    return 0


def _origin(
    name: str, config: "Config", weights: "Weights", overrides: Sequence[str]
) -> str:
    """Says whose mean or std it is, before the file's are written into the config."""
    if any(item.startswith(f"--config.model.{name}=") for item in overrides):
        return "command line"
    if config.model[name] is not None:
        return "config"
    return "file" if name in weights.metadata else "data set"
