"""The packages that a campaign's bundle brings, installed where they are missing.

    python -m launch.gpu_measure.wheels WHEELS SITE FILE

What imports and has a version decides, not what was noted at an earlier start, whose
SITE may have been left behind on another machine. Each wheel is installed by itself,
pure ones first, so that one that this Python refuses stops no other. FILE,
`install.json`, says what is still missing and why; without `NEEDED` nothing can be
measured.
"""

import os
import pathlib
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from samrobust.system.files import write_json

__all__ = ["NEEDED", "main"]

NEEDED = ("ml_collections", "safetensors", "samrobust")  # by all other blocks
_PIP = ("install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade")


def main() -> None:
    """Installs what does not import into the folder of the command line."""
    folder, site, file = map(pathlib.Path, sys.argv[1:])
    wheels = sorted(folder.glob("*.whl"), key=lambda p: (not _is_pure(p.name), p.name))
    modules = {wheel.name: _modules_of(wheel) for wheel in wheels}
    absent = _complaints(modules, site)
    refused = {name: _install(folder / name, site) for name in absent}
    still = _complaints({name: modules[name] for name in absent}, site)
    left = {name: refused[name] or why for name, why in still.items()}
    needed = _complaints({name: (name,) for name in NEEDED}, site)
    installed = [name for name in absent if name not in left]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"installed": installed, "missing": left | needed})
    if needed:
        why = "; ".join(f"{name}: {text}" for name, text in (left | needed).items())
        sys.exit(f"Expected {' and '.join(needed)}, which all blocks want, got {why}")


def _is_pure(name: str) -> bool:
    return name.endswith("-none-any.whl")


def _modules_of(wheel: pathlib.Path) -> tuple[str, ...]:
    """Returns the packages of a wheel, or its modules where it has no package."""
    try:
        with zipfile.ZipFile(wheel) as file:
            paths = [name.split("/") for name in file.namelist()]
    except (OSError, zipfile.BadZipFile):
        return ()
    packages = {p[0] for p in paths if p[1:] == ["__init__.py"]}
    alone = {p[0].partition(".")[0] for p in paths if len(p) == 1}
    return tuple(sorted(packages or alone))


def _complaints(
    modules: Mapping[str, Sequence[str]], site: pathlib.Path
) -> dict[str, str]:
    """Returns those that do not import or have no version, each with the reason.

    A checkout imports without a version, which all results tell. All at once, in
    processes of their own: an extension may end its process.
    """
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(site))))

    def complaint(name: str) -> str:
        if not modules[name]:
            return "It has no module, or is no wheel."
        package = name.partition("-")[0]
        script = f"import importlib.metadata, {', '.join(modules[name])}"
        script += f"; importlib.metadata.version({package!r})"
        return _last_words("-c", script, PYTHONPATH=path)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = zip(modules, pool.map(complaint, modules), strict=True)
        return {name: why for name, why in found if why}


def _install(wheel: pathlib.Path, site: pathlib.Path) -> str:
    """Returns why pip refused a wheel; empty where it did not."""
    return _last_words("-m", "pip", *_PIP, "--target", str(site), str(wheel))


def _last_words(*words: str, **environment: str) -> str:
    """Returns the last line of a Python that failed; empty where it did not."""
    done = subprocess.run(
        (sys.executable, *words),
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[-1][-300:] if lines else f"exit code {done.returncode}"


if __name__ == "__main__":
    main()
