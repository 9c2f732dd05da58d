"""`samrobust doctor`: what this machine has, and whether the main job can run on it.

A line each. Works where packages are missing or JAX does not load; asks no network and
trains nothing.
"""

import argparse
import contextlib
import os
import pathlib
import platform
import re
import shutil
import warnings
from collections.abc import Callable
from importlib import metadata

from samrobust import __version__
from samrobust.checks import check, shorten
from samrobust.system import runtime

__all__ = ["ABOUT", "EXTRAS", "add_flags", "run"]

# Extras, and of each a distribution that nothing else brings.
EXTRAS = {
    "aot": "nvidia-cuda-nvcc",
    "cuda12": "jax-cuda12-plugin",
    "cuda13": "jax-cuda13-plugin",
    "gcs": "gcsfs",
    "s3": "s3fs",
    "tpu": "libtpu",
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
}


_PACKAGE = pathlib.Path(__file__).resolve().parents[1]

ABOUT = {
    "help": "devices, packages, caches and data of this machine",
    "description": "Checks this machine: packages against the tested versions, "
    "devices, memory, caches, data sets and what would be downloaded, extras. Exit "
    "code 1: `samrobust table` cannot run here; the line says why. Needs no "
    "network.",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds no flag: the command has none."""
    del parser


def run(arguments: argparse.Namespace) -> int:
    """Prints the lines; returns the exit code, 1 if one of them stops the main job."""
    del arguments
    code = 0
    for name, look in _LOOKS.items():
        try:
            found, mark = look(), "ok"
        except Exception as error:  # a broken installation raises anything
            found, mark, code = str(error) or type(error).__name__, "!!", runtime.FAILED
        print(f"{mark}  {name:<9} {runtime.one_line(found)}")
    return code


def _python() -> str:
    return (
        f"samrobust {__version__} in {_PACKAGE}, Python {platform.python_version()}, "
        f"{platform.platform()}"
    )


def _packages() -> str:
    """Compares what is installed with what is wanted, and with what is tested.

    Raises:
      ValueError: if one is missing.
    """
    wanted = [r for r in metadata.requires("samrobust") or () if "extra ==" not in r]
    names = [re.split(r"[^\w.-]", requirement)[0] for requirement in wanted]
    missing = [name for name in names if not _version(name)]
    fix = "Install them: pip install samrobust."
    check(not missing, "all packages of samrobust", fix, missing=", ".join(missing))
    tested: dict[str, set[str]] = {}  # of a package several, by Python's version
    for name, version in re.findall(r"(?m)^([\w.-]+)==([\w.]+)", _lock()):
        tested.setdefault(name, set()).add(version)
    differ = [
        f"{name} {found} ({' or '.join(sorted(versions))})"
        for name, versions in tested.items()
        if (found := _version(name)) and found not in versions
    ]
    of = f"other than tested: {shorten(', '.join(differ))}" if differ else "as tested"
    return f"JAX {_version('jax')}, Flax {_version('flax')}; versions {of}"


def _version(name: str) -> str:
    """Returns the version of a package; empty where it is not installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return ""


def _lock() -> str:
    """Returns the lock file of the checkout or the wheel."""
    folders = _PACKAGE.parent, _PACKAGE
    files = (folder / "requirements.lock" for folder in folders)
    return next(file for file in files if file.is_file()).read_text(encoding="utf-8")


def _devices() -> str:
    """Names the devices that JAX takes.

    Raises:
      ValueError: if there is none, or not the one that JAX_PLATFORMS asks for.
    """
    import jax

    from samrobust.system.distributed import check_platform

    check_platform()
    kinds = [device.device_kind for device in jax.local_devices()]
    found = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    stats = jax.local_devices()[0].memory_stats() or {}
    each = f" of {_size(stats['bytes_limit'])} each" if "bytes_limit" in stats else ""
    platforms = os.environ.get("JAX_PLATFORMS")
    chosen = "the first of TPU, GPU and CPU that works (JAX_PLATFORMS is not set)"
    chosen = f"all that JAX_PLATFORMS={platforms} allows" if platforms else chosen
    on_cpu = not platforms and jax.default_backend() == "cpu"
    idle = on_cpu and os.path.exists("/dev/nvidia0")
    fix = ' An NVIDIA GPU is there and not used: pip install "samrobust[cuda13]".'
    return f"{found}{each}, {chosen}.{fix if idle else ''}"


def _memory() -> str:
    total = _size(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError):  # of Linux; counts what caches give back
        text = pathlib.Path("/proc/meminfo").read_text(encoding="utf-8")
        if found := re.search(r"MemAvailable: +(\d+)", text):
            total = f"{_size(1024 * int(found[1]))} free of {total}"
    return f"{total}, {runtime.usable_cores()} cores for this process"


def _programs() -> str:
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not folder and runtime.is_off("SAMROBUST_COMPILATION_CACHE"):
        return "compiled programs are not kept (SAMROBUST_COMPILATION_CACHE)"
    return f"compiled programs: {_cache('xla', folder)}"


def _images() -> str:
    return f"decoded images: {_cache('data')}"


def _cache(name: str, other: str | None = None) -> str:
    """Says what a cache holds, perhaps in another folder, or why it is not used."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        folder = pathlib.Path(other) if other else runtime.trusted_cache_folder(name)
    if folder is None:
        return "; ".join(str(warning.message) for warning in said) or "not used"
    files = [path for path in folder.rglob("*") if path.is_file()]
    held = _size(sum(path.stat().st_size for path in files))
    return f"{held} in {folder}, {_free(folder)}"


def _data() -> str:
    from samrobust.data import cifar, official

    specs = (official.CIFAR10, official.CIFAR100)
    found = [f"{spec.name} {cifar.whereabouts(spec)}" for spec in specs]
    folder = cifar.default_data_dir()
    return f"digits in the package; {'; '.join(found)}; {folder}: {_free(folder)}"


def _output() -> str:
    here = pathlib.Path.cwd()
    fix = "Run elsewhere, or give a --workdir."
    check(os.access(here, os.W_OK), "a folder to write runs/ in", fix, folder=str(here))
    return f"runs/ in {here}, {_free(here)}"


def _extras() -> str:
    there = [name for name, package in EXTRAS.items() if _version(package)]
    lacking = ", ".join(name for name in EXTRAS if name not in there)
    how = f'; not there: {lacking} (pip install "samrobust[NAME]")' if lacking else ""
    return f"{', '.join(there) or 'none'}{how}"


def _free(folder: pathlib.Path) -> str:
    """Says how much room the disk has on which a folder lies, or will."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return f"{_size(shutil.disk_usage(there).free)} free"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


_LOOKS: dict[str, Callable[[], str]] = {
    "python": _python,
    "packages": _packages,
    "devices": _devices,
    "memory": _memory,
    "programs": _programs,
    "images": _images,
    "data": _data,
    "output": _output,
    "extras": _extras,
}
