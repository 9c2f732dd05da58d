"""The official archive of a data set: from a directory or a server, and verified.

Nothing is used before its SHA-256 is right. A download that breaks is taken up where
it broke, in this process or a later one.
"""

import dataclasses
import logging
import pathlib
import time

from samrobust.data.splits import DatasetUnavailableError
from samrobust.system.files import digest

__all__ = ["ArchiveFile", "find_archive"]

_MAX_NAMES = 4  # in a message
_MAX_ATTEMPTS = 5  # in a row that may bring no byte before we give up
_BACKOFF = 1.0  # seconds before the second of them; doubled for each further one
_TIMEOUT = 30.0  # seconds of silence after which the connection counts as broken

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ArchiveFile:
    """A public archive: its name, address, size and hash."""

    name: str
    url: str
    num_bytes: int
    sha256: str


def find_archive(
    archive: ArchiveFile,
    downloads: pathlib.Path,
    manual_dir: pathlib.Path | None = None,
    *,
    otherwise: str = "",
) -> pathlib.Path:
    """Returns the path of the verified archive, downloading it if necessary.

    Looks in manual_dir, `<downloads>/manual` and downloads, in this order. With a
    manual_dir nothing is downloaded.

    Args:
      archive: which one.
      downloads: the directory for downloads.
      manual_dir: a directory where the user put the archive.
      otherwise: a sentence that says what else can be done where it is missing.

    Returns:
      The path. **Guarantees**: the file's SHA-256 is the archive's.

    Raises:
      DatasetUnavailableError: if a file of that name in one of the first two
        directories, with a manual_dir of all three, has another hash or cannot be read;
        or the archive is in none of them, and a manual_dir is given or it cannot be
        downloaded. Says what was found instead.
    """
    here = downloads if manual_dir is not None else None  # else `_download` looks
    for directory in (manual_dir, downloads / "manual", here):
        if directory is not None and (directory / archive.name).is_file():
            _verify(archive, directory / archive.name)
            return directory / archive.name
    wanted = (
        f"{archive.name} ({archive.num_bytes} bytes, sha256 {archive.sha256}) from "
        f"{archive.url}"
    )
    if manual_dir is not None:
        raise DatasetUnavailableError(
            f"Expected {archive.name} in manual_dir, got "
            f"{_found(archive, manual_dir)}. "
            f"Set it to a folder with {wanted}; or leave it out, to download that. "
            f"{otherwise}".rstrip()
        )
    try:
        return _download(archive, downloads)
    except (OSError, ValueError) as error:  # a broken line or disk; a wrong hash
        raise DatasetUnavailableError(
            f"Expected {archive.name}, got {_found(archive, downloads / 'manual')} and "
            f"no download. Put {wanted} into {downloads / 'manual'}. {otherwise} "
            f"The download failed: {error}"
        ) from error


def _found(archive: ArchiveFile, directory: pathlib.Path) -> str:
    """Describes what is there instead of an archive."""
    if directory.is_file():
        return f"manual_dir={str(directory)!r}, a file and not its folder"
    try:
        names = sorted(
            path.name + "/" * path.is_dir()
            for path in directory.iterdir()
            if path.name.startswith(archive.name.partition("-")[0])
        )
    except OSError as error:
        return f"no folder {directory} ({error.strerror})"
    if not names:
        return f"no such file in {directory}"
    return f"{', '.join(names[:_MAX_NAMES])} in {directory}"


def _verify(archive: ArchiveFile, path: pathlib.Path) -> None:
    """Refuses a file with another hash than the archive's."""
    try:
        found = digest(path)
    except OSError as error:
        raise DatasetUnavailableError(
            f"Expected to read {path}, got: {error}"
        ) from error
    if found != archive.sha256:
        raise DatasetUnavailableError(
            f"Expected sha256={archive.sha256} ({archive.num_bytes} bytes) of {path}, "
            f"got sha256={found} ({path.stat().st_size} bytes): a part of the archive, "
            f"or another one. Put the one from {archive.url} in its place."
        )


def _download(archive: ArchiveFile, downloads: pathlib.Path) -> pathlib.Path:
    """Downloads the archive unless it is there already; verified either way."""
    path = downloads / archive.name
    if digest(path) == archive.sha256:
        return path
    downloads.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    for _ in range(2):  # what was resumed may have been damaged
        _complete(archive.url, partial)
        if digest(partial) == archive.sha256:
            return partial.replace(path)
        partial.unlink()
    raise ValueError(f"what {archive.url} sends does not match the known hash.")


def _complete(url: str, partial: pathlib.Path) -> None:
    """Downloads the rest of a file, which outlives a broken line and the process.

    Raises:
      ConnectionError: if too many attempts bring nothing.
      OSError: if the server refuses.
    """
    import requests

    failures = 0
    while True:
        size = _size(partial)
        try:
            return _fetch_rest(url, partial, size)
        except requests.RequestException as error:
            failures = 1 if _size(partial) > size else failures + 1
            if _is_final(error.response):
                raise
            if failures >= _MAX_ATTEMPTS:
                raise ConnectionError(str(error)) from error
            logger.warning("The download failed and is tried again: %s", error)
            time.sleep(_BACKOFF * 2 ** (failures - 1))


def _size(path: pathlib.Path) -> int:
    """Returns how many bytes there are by now."""
    return path.stat().st_size if path.exists() else 0


def _fetch_rest(url: str, partial: pathlib.Path, size: int) -> None:
    """Appends what is missing after `size` bytes, by an HTTP Range header.

    A server that ignores the header sends everything again, and so we take it.
    """
    import requests
    import tqdm

    headers = {"Accept-Encoding": "identity"}
    if size:
        headers["Range"] = f"bytes={size}-"
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # nothing is missing; if that is wrong, the hash will tell
        response.raise_for_status()
        resumed = response.status_code == requests.codes.partial_content
        start = size if resumed else 0
        length = int(response.headers.get("Content-Length", 0))
        with (
            partial.open("ab" if resumed else "wb") as file,
            tqdm.tqdm(
                total=start + length or None,
                initial=start,
                unit="B",
                unit_scale=True,
                desc=pathlib.Path(url).name,
                disable=None,  # where there is no terminal
            ) as progress,
        ):
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
                progress.update(len(chunk))


def _is_final(response) -> bool:
    """Returns whether asking again is of no use: a refusal, except "later, please"."""
    if response is None:
        return False
    code = response.status_code
    return 400 <= code < 500 and code not in (408, 425, 429)
