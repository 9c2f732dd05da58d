"""A checked cache of decoded arrays: .npy files, memory-mapped, with their hashes.

Decoding a data set takes seconds and mapping it takes none. A manifest beside the
arrays holds the SHA-256 of each file and says what they were decoded from, so that
damage and a changed source are noticed, and the arrays decoded again.
"""

import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from samrobust.system import files, storage
from samrobust.system.runtime import trusted_cache_folder

__all__ = ["Arrays", "cached_arrays", "default_cache_dir"]

Arrays = dict[str, np.ndarray]

# What json.loads and np.load raise for files that are damaged or of another kind.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def default_cache_dir() -> pathlib.Path | None:
    """Returns `$XDG_CACHE_HOME/samrobust/data`, by default below `~/.cache`.

    None where others could write to it, so that its content cannot be trusted.
    """
    return trusted_cache_folder("data")


def cached_arrays(
    directory: pathlib.Path | None,
    stem: str,
    source: Mapping[str, Any],
    decode: Callable[[], Arrays],
    verify: Callable[[Arrays], None] = lambda _: None,
) -> Arrays:
    """Returns `decode()`, or the same arrays from an intact cache of it.

    The files are `<stem>-<key>-<name>.npy`, one an array, and the manifest
    `<stem>-<key>.json`; the key is a hash of the source, so that caches of several
    sources lie side by side. They are replaced atomically, the manifest last: neither a
    process that is killed nor several at the same time leave a cache that passes for
    another one.

    Args:
      directory: of the cache; made where it is missing. None: there is no cache.
      stem: start of the file names.
      source: identity of what is decoded, as JSON values. To each its own cache.
      decode: makes the arrays.
      verify: raises `ValueError` for arrays that cannot be right, cached or decoded.

    Returns:
      Read-only arrays by name, memory-mapped wherever the directory can be written.

    Raises:
      ValueError: if verify refuses what was decoded; nothing is written then.

    Warns:
      UserWarning: if a cache is there but damaged (it is rebuilt), or if the cache
        cannot be written (the arrays stay in memory).
    """
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]
    manifest = directory and directory / f"{stem}-{key}.json"
    if manifest and os.path.exists(manifest):  # Path.exists may raise
        try:
            arrays = _read(manifest, source)
            verify(arrays)
        except _DAMAGE as error:
            warnings.warn(
                f"The cache {manifest} cannot be used and is rebuilt: {error}",
                stacklevel=2,
            )
        else:
            return arrays
    arrays = decode()
    verify(arrays)
    try:
        if manifest:
            return _write(manifest, source, arrays)
    except OSError as error:  # NumPy's own for a full disk has no strerror
        reason = error.strerror or "No space left"  # the same text, so said once
        warnings.warn(
            f"The cache {directory} cannot be written ({reason}): the arrays are kept "
            "in memory, and decoded again next time. Set cache_dir or XDG_CACHE_HOME "
            "to a directory that can be written.",
            stacklevel=2,
        )
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


def _read(manifest: pathlib.Path, source: Mapping[str, Any]) -> Arrays:
    """Maps the arrays of a manifest, or raises an error that says what is wrong."""
    content = json.loads(manifest.read_text())
    if content["source"] != source:
        raise ValueError("it is of other data")
    arrays = {}
    for name, sha256 in content["sha256"].items():
        path = _array_path(manifest, name)
        found = files.digest(path)
        if not found:
            raise FileNotFoundError(f"No such file: {path.name}")
        if found != sha256:
            raise ValueError(f"{path.name} is damaged (its hash differs)")
        arrays[name] = np.load(path, mmap_mode="r")
    return arrays


def _write(manifest: pathlib.Path, source: Mapping[str, Any], arrays: Arrays) -> Arrays:
    """Writes the arrays, then the manifest; returns the arrays, mapped."""
    manifest.parent.mkdir(parents=True, exist_ok=True)
    mapped, hashes = {}, {}
    temporary = storage.temporary_beside(manifest)
    try:
        for name, array in arrays.items():
            path = _array_path(manifest, name)
            temporary = storage.temporary_beside(path)
            with temporary.open("xb") as file:
                np.save(file, array)
            # Mapped before it gets its name, so that it is this file and not the one of
            # another process that is doing the same.
            mapped[name] = np.load(temporary, mmap_mode="r")
            hashes[name] = files.digest(temporary)
            if files.digest(path) == hashes[name]:
                # Another has been quicker. On a file server a file that is replaced is
                # lost to the machines that have mapped it.
                mapped[name] = np.load(path, mmap_mode="r")
                temporary.unlink()
            else:
                temporary.replace(path)
        temporary = storage.temporary_beside(manifest)
        temporary.write_text(json.dumps({"source": source, "sha256": hashes}, indent=1))
        storage.remove_left_behind(manifest.parent, storage.modified(temporary))
        temporary.replace(manifest)
    finally:
        temporary.unlink(missing_ok=True)
    return mapped


def _array_path(manifest: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the file of one array of a manifest."""
    return manifest.with_name(f"{manifest.stem}-{name}.npy")
