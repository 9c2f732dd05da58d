"""`samrobust export`: a run's network to a file that other tools read."""

import argparse
import pathlib
from typing import Any

from samrobust.checks import check
from samrobust.cli import flags

__all__ = ["ABOUT", "add_flags", "run"]


ABOUT = {
    "help": "a run's network for PyTorch, as safetensors, or for RobustBench",
    "description": "Writes the network of a run under the names of the paper's "
    "PyTorch code.",
    "epilog": "docs/interchange.md describes the files.",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--workdir", **flags.WORKDIR, required=True, help="of the run")
    formats = ("safetensors", "pytorch", "robustbench")
    add("--format", choices=formats, required=True, help="the last two need torch")
    add("--output", **flags.FILE, required=True, help="a file; robustbench: a folder")
    add("--checkpoint", **flags.CHECKPOINT)
    add("--step", **flags.STEP)


def run(arguments: argparse.Namespace, stop: Any) -> int:
    """Writes the network of a run as other tools read it.

    Raises:
      ValueError: for a workdir without a run, an output of another suffix or beside
        whose name another JSON file lies, or where PyTorch is needed and not installed.
      CheckpointError: if the run has no intact checkpoint of that kind.
    """
    from samrobust.experiments.interchange import export_weights
    from samrobust.experiments.networks import checkpoints_of
    from samrobust.experiments.reporting.console import make_console
    from samrobust.experiments.robustbench import write_bundle
    from samrobust.experiments.workdir import config_of_run
    from samrobust.models.torch.files import import_torch
    from samrobust.models.torch.weights import (
        SUFFIXES,
        is_metadata,
        write_pytorch,
        write_safetensors,
    )

    del stop  # it takes seconds
    workdir, output = arguments.workdir, pathlib.Path(arguments.output)
    kind, suffixes = arguments.format, SUFFIXES.get(arguments.format)
    if kind != "safetensors":
        import_torch(f"write --format={kind}")
    if suffixes is None:
        wanted, fits = "a folder for the bundle", not output.is_file()
    else:
        wanted = f"--output=NAME{' or NAME'.join(suffixes)} with --format={kind}"
        fits = output.suffix in suffixes and not output.is_dir()
    check(fits, wanted, output=str(output))
    beside = output.with_suffix(".json")
    check(
        kind != "pytorch" or not beside.exists() or is_metadata(beside),
        "no other JSON file where the weights' is written",
        "Choose another --output.",
        file=str(beside),
    )
    config = config_of_run(workdir)
    is_ours = config.model.name == "preact_resnet"
    check(
        kind != "robustbench" or is_ours,
        "model.name=preact_resnet with --format=robustbench",
        "Its PyTorch code is that network's. Use --format=safetensors.",
        **{"model.name": config.model.name},
    )
    which = arguments.checkpoint or checkpoints_of(config)[0]
    weights = export_weights(config, workdir, which, arguments.step)
    output.parent.mkdir(parents=True, exist_ok=True)
    if kind == "robustbench":
        write_bundle(output, weights, config, workdir, which)
    else:
        write = write_pytorch if kind == "pytorch" else write_safetensors
        write(output, weights)
    step = weights.metadata["origin"]["step"]
    text = f"Wrote the {which} checkpoint of {workdir}, of step {step}, to {output}"
    make_console().print(text, soft_wrap=True)
    return 0
