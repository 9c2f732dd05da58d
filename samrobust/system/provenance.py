"""The provenance of a number: commit, versions, device, command, time; its network."""

import datetime
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from typing import Any

import jax
import numpy as np

from samrobust.system.runtime import usable_cores
from samrobust.types import PyTree

__all__ = ["checksum", "command", "commit", "provenance", "random_bits"]

# Of the environment, where they are set: they change how programs round.
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION")
_PACKAGES = ("samrobust", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def provenance() -> dict[str, Any]:
    """Returns what to keep with a measurement, ready for JSON.

    Returns:
      `commit` (`+changes` if files differ from it; of an installed wheel the tag of
      its release, as `v0.2.0`; None where git does not answer),
      the versions of the packages, `python`, `device`, `num_devices`, `num_processes`,
      `platform`, `command` and `date` (UTC, ISO 8601); `flags`, where there are any:
      the variables of `_FLAGS` that the environment sets.
    """
    device = jax.devices()[0]
    flags = {name: os.environ[name] for name in _FLAGS if os.environ.get(name)}
    return {
        "commit": commit(),
        **{package: metadata.version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "platform": platform.platform(),
        "command": command(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **({"flags": flags} if flags else {}),
    }


def command() -> str:
    """Returns the command line of this process, its program without the folder."""
    return shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])


@functools.cache
def random_bits() -> str:
    """Returns what JAX draws from key 0, in hexadecimal digits."""
    bits = jax.random.bits(jax.random.key(0), (3,))  # several: settings differ there
    return "".join(f"{value:08x}" for value in bits.tolist())


def checksum(tree: PyTree) -> str:
    """Returns the SHA-256 of all numbers in a tree, with their names and dtypes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(jax.device_get(leaf))
        name = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()


@functools.cache  # what is checked out later is not what runs
def commit() -> str | None:
    """Returns the commit of this package as of the first call, as in `provenance`."""
    checkout = pathlib.Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():  # a wheel, maybe in somebody's checkout
        return f"v{metadata.version('samrobust')}"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    """Returns the processor's model and the number of cores this process may use."""
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        names = [
            x.partition(":")[2].strip() for x in lines if x.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model} ({usable_cores()} cores)"
