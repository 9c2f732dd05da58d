"""All that is small in one file: results, logs, XLA's autotuning.

    python -m launch.gpu_measure.archive CACHE FOLDER [--needed]

copies what the archive carries of a cache of compiled programs: the files of autotuning
alone, with which another machine of the kind compiles sooner.
"""

import argparse
import pathlib
import shutil
import sys
import tarfile

__all__ = ["main", "write_archive"]

_LARGEST = 4 * 2**20  # bytes of a file that is carried
_LEFT = {"site", "data", "checkpoints", "traces"}


def write_archive(workdir: pathlib.Path, file: pathlib.Path) -> None:
    """Packs all that is small below a campaign's folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    with tarfile.open(temporary, "w:gz") as archive:
        for path in sorted(workdir.rglob("*")):
            name = path.relative_to(workdir).as_posix()
            small = path.is_file() and path.stat().st_size <= _LARGEST
            if small and path not in (file, temporary) and _is_carried(name):
                archive.add(path, name)
    temporary.replace(file)


def main() -> None:
    """Copies what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--needed", action="store_true", help="fail without any")
    arguments = parser.parse_args()
    carried = []
    for path in sorted(arguments.cache.rglob("*")):
        name = path.relative_to(arguments.cache)
        if path.is_file() and _is_carried(f"cache/{name.as_posix()}"):
            carried.append(name)
            (arguments.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, arguments.folder / name)
    print(f"{len(carried)} files")
    if arguments.needed and not carried:
        sys.exit(f"Expected files of autotuning in {arguments.cache}, got none.")


def _is_carried(name: str) -> bool:
    parts = name.split("/")
    if "cache" in parts:  # of the others only their programs' times are of interest
        return parts[0] == "cache" and "autotune" in name
    return not set(parts) & _LEFT


if __name__ == "__main__":
    main()
