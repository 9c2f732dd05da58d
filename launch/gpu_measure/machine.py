"""The machine: versions, what XLA knows of the device, and the most that it can do.

    python -m launch.gpu_measure.machine --config=FILE --workdir=DIR

Writes `machine.json`, again with each part that is known, and on a GPU `target.txtpb`,
which `samrobust bench --aot` reads as a file of `bench/targets`; or why there is none.
"""

import argparse
import functools
import importlib.metadata
import os
import pathlib
import subprocess
from typing import Any

import jax

from samrobust.experiments import configuration
from samrobust.studies.bench.programs import roofline
from samrobust.studies.bench.timing import measure
from samrobust.system.files import write_json, write_text
from samrobust.system.jax_internals import target_config
from samrobust.system.provenance import provenance

__all__ = ["main"]

_PACKAGES = ("torch", "triton", "nvidia-cudnn-cu13", "jax-cuda13-pjrt")


def main() -> None:
    """Writes what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    arguments, overrides = parser.parse_known_args()
    folder = arguments.workdir
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = provenance() | {
        "cores": os.cpu_count(),
        "packages": _versions(),
        "nvidia-smi": _output("nvidia-smi"),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    path = folder / "machine.json"
    write_json(path, found)
    timed = functools.partial(
        measure,
        repeats=5,
        min_seconds=0.2,
        warmup_calls=3,
        wait=jax.block_until_ready,
    )
    for precision in ("bfloat16", "float32"):
        own = [*overrides, f"--config.model.dtype={precision}"]
        config = configuration.load_config(f"{arguments.config}:st", own)
        found[precision] = roofline(config, timed)
        write_json(path, found)
    try:
        if text := target_config():
            write_text(folder / "target.txtpb", text)
    except Exception as error:  # of XLA's internals: the least of what is wanted here
        found["target_config"] = f"{type(error).__name__}: {error}"
        write_json(path, found)


def _versions() -> dict[str, str]:
    """Returns the versions of the packages that are there."""
    there = {one.name: one.version for one in importlib.metadata.distributions()}
    return {name: there[name] for name in _PACKAGES if name in there}


def _output(*command: str) -> str:
    """Returns what a command prints; empty where there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


if __name__ == "__main__":
    main()
