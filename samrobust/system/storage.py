"""Files of a workdir, on a disk or in an object store: `gs://`, `s3://`, `memory://`.

An `ObjectPath` is a path in an object store that is asked, listed and read as any other
`pathlib.Path`, through fsspec. Whoever takes it for a local path is refused, so nothing
is written beside the store by mistake. What a disk and a store do each in their own way
stands here as functions, and all else of samrobust goes through them:

    what         on a disk                          in a store
    `replace`    written beside, flushed, renamed   a put, whole or not at all
    `link`       a hard link, which fails where     a put on condition that there is
                 the name is taken                  no object of that name
    `touch`      the file server's clock            the store's, by another put
    `append`     O_APPEND, flushed                  read and replaced: one writer!

Stores that cannot create on condition cannot hold claims, and are none of those above:
Google's has `ifGenerationMatch=0`, S3 `If-None-Match: *`. `memory://` is there as long
as its process, for tests.
"""

import contextlib
import errno
import fcntl
import fnmatch
import json
import os
import pathlib
import re
import shutil
import threading
import uuid
from collections.abc import Generator, Iterator
from importlib import util
from typing import Any

from samrobust.checks import check

__all__ = [
    "ObjectPath",
    "append",
    "fuse_mount",
    "link",
    "modified",
    "of_file",
    "remove_left_behind",
    "remove_tree",
    "replace",
    "temporary_beside",
    "to_path",
    "touch",
]

# By protocol, the package that fsspec wants for it; also the extra of ours.
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3"), "memory": ("fsspec", "")}
_one_at_a_time = threading.Lock()
_TEMPORARY = re.compile(r"\.(.+\.)?[0-9a-f]{32}\.tmp")
_LEFT_BEHIND = 3600.0  # seconds after which such a file is nobody's


def to_path(place: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the path of a file or folder on a disk or in an object store.

    Args:
      place: a local path, or as `gs://BUCKET/FOLDER`.

    Raises:
      ValueError: if it is a URL of another kind, or the package for it is missing.

    >>> to_path("gs://bucket/runs") / "sam"  # doctest: +SKIP
    ObjectPath('gs://bucket/runs/sam')
    """
    if not isinstance(place, str) or "://" not in place:
        return place if isinstance(place, pathlib.Path) else pathlib.Path(place)
    protocol, _, name = place.partition("://")
    wanted = ", ".join(f"{known}://" for known in _PACKAGES)
    check(protocol in _PACKAGES, f"a local path, or one of {wanted}", path=place)
    bucket = name.partition("/")[0]
    check(bool(bucket), f"{protocol}://BUCKET/FOLDER", path=place)
    package, extra = _PACKAGES[protocol]
    check(
        util.find_spec(package) is not None,
        f"the package {package} for {protocol}://",
        f"Install the extra: pip install 'samrobust[{extra}]'.",
        path=place,
    )
    return ObjectPath(place)


class ObjectPath(pathlib.PosixPath):
    """A path in an object store; folders are there as long as something lies in them.

    Made by `to_path`. Errors of the store are `OSError`s: `ConnectionError` where the
    next attempt may succeed.
    """

    def __str__(self) -> str:
        first, *rest = self.parts or ("",)
        is_whole = first.endswith(":") and first[:-1] in _PACKAGES
        return f"{first}//{'/'.join(rest)}" if is_whole else "/".join(self.parts)

    def __fspath__(self) -> str:
        check(False, "a local path", "It is in an object store.", path=str(self))
        raise AssertionError

    def is_absolute(self) -> bool:
        """Returns that it does not depend on the working directory."""
        return True

    def absolute(self) -> "ObjectPath":
        """Returns the path itself."""
        return self

    def resolve(self, strict: bool = False) -> "ObjectPath":
        """Returns the path itself: a store has no links."""
        del strict
        return self

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Returns what a method of fsspec's file system says of this path."""
        with _as_os_errors():
            return getattr(self._store(), name)(str(self), *arguments, **options)

    def _store(self) -> Any:
        import fsspec

        # gcsfs would ask for the kind of bucket, which not every account may know.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        # Others write, too: nothing that was listed may be remembered.
        return fsspec.filesystem(self.parts[0][:-1], use_listings_cache=False)

    def exists(self) -> bool:
        """Tells whether there is an object of that name, or one below it."""
        return self.call("exists")

    def is_file(self) -> bool:
        """Tells whether there is an object of that name."""
        return self.call("isfile")

    def is_dir(self) -> bool:
        """Tells whether there are objects below it."""
        return self.call("isdir")

    def iterdir(self) -> Generator["ObjectPath", None, None]:
        """Yields what lies right below it.

        Raises:
          FileNotFoundError: if nothing does.
        """
        for name in self.call("ls", detail=False):
            yield self / name.rstrip("/").rpartition("/")[2]

    def walk_files(self) -> list["ObjectPath"]:
        """Returns all objects below it, from one listing."""
        found = self.call("find")
        prefix = self.call("_strip_protocol").rstrip("/") + "/"
        return [self / name.removeprefix(prefix) for name in found if name != prefix]

    def glob(self, pattern: str) -> Generator["ObjectPath", None, None]:
        """Yields what lies below it and matches, as of a disk; without `**`."""
        wanted = pattern.split("/")
        if len(wanted) == 1:
            with contextlib.suppress(FileNotFoundError):
                found = [path for path in self.iterdir() if path != self]
                yield from (p for p in found if fnmatch.fnmatchcase(p.name, pattern))
            return
        depth = len(self.parts)
        parts = {path.parts[depth : depth + len(wanted)] for path in self.walk_files()}
        for found in sorted(parts):
            pairs = zip(found, wanted, strict=False)
            if len(found) == len(wanted) and all(
                fnmatch.fnmatchcase(*pair) for pair in pairs
            ):
                yield self.joinpath(*found)

    def read_bytes(self) -> bytes:
        """Returns the object's content."""
        return self.call("cat_file")

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """Returns the object's content as text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def download(self, file: pathlib.Path) -> None:
        """Copies the object into a local file."""
        self.call("get_file", str(file))

    def upload(self, file: pathlib.Path) -> None:
        """Replaces the object by a copy of a local file, in one step."""
        with _as_os_errors():
            self._store().put_file(str(file), str(self))

    def mkdir(
        self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False
    ) -> None:
        """Does nothing: objects need no folder."""

    def rmdir(self) -> None:
        """Does nothing: an empty folder is none."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object."""
        with contextlib.suppress(*[FileNotFoundError] * missing_ok):
            self.call("rm_file")

    def rename(self, target: pathlib.PurePath) -> "ObjectPath":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Copies the object, then removes it; a kill may leave two."""
        self.call("cp_file", str(target))
        self.unlink()
        return ObjectPath(str(target))


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Turns errors of the clients of stores into those of an operating system."""
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package not in (
            *("gcsfs", "google", "requests"),
            *("aiohttp", "aiobotocore", "botocore"),
        ):
            raise
        code = getattr(error, "code", None)
        passes = isinstance(code, int) and (code >= 500 or code in (408, 429))
        kind = type(error).__name__
        passes |= "Connect" in kind or "Timeout" in kind or package == "aiohttp"
        passes |= package == "requests" or kind == "TransportError"
        message = " ".join(f"{kind}: {error}".split())
        new = ConnectionError(message) if passes else OSError(errno.EACCES, message)
        raise new from error


def temporary_beside(path: pathlib.Path) -> pathlib.Path:
    """Returns a hidden name in the same directory that nobody else uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def remove_left_behind(folder: pathlib.Path, now: float) -> None:
    """Removes old ones of killed processes; `now` is the file server's time."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            is_ours = _TEMPORARY.fullmatch(path.name)
            if is_ours and now - modified(path) > _LEFT_BEHIND:
                path.unlink()


def replace(path: pathlib.Path, content: bytes, *, durable: bool = True) -> None:
    """Replaces a file in one step; on return it outlives a loss of power, if wanted."""
    if isinstance(path, ObjectPath):
        path.call("pipe_file", content)
        return
    temporary = temporary_beside(path)
    try:
        with of_file(path), temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            _sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def of_file(path: pathlib.Path) -> Iterator[None]:
    """Names a file in the error of a write, as of a full disk, that names none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


def _sync(folder: pathlib.Path) -> None:
    """Makes the names in a folder outlive a loss of power, where it can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append(path: pathlib.Path, line: bytes) -> None:
    """Adds a line of JSON to a file; durable on return.

    A line that a kill cut off is removed. In an object store the file is read and
    replaced: there nobody else may add to it meanwhile.
    """
    if isinstance(path, ObjectPath):
        before = b""
        with contextlib.suppress(FileNotFoundError):
            before = path.read_bytes()
        replace(path, _whole_lines(before) + line)
        return
    is_new = not path.exists()
    with of_file(path), path.open("ab+") as file:
        with contextlib.suppress(OSError):  # a file server may have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                before = file.read()
                kept = _whole_lines(before)
                file.truncate(min(len(kept), len(before)))
                line = kept[len(before) :] + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        _sync(path.parent)


def _whole_lines(content: bytes) -> bytes:
    r"""Returns lines of JSON, each ended, without a last one that was cut off.

    >>> _whole_lines(b'{}\n{"a"'), _whole_lines(b'{}\n{"a": 1}')
    (b'{}\n', b'{}\n{"a": 1}\n')
    """
    end = content.rfind(b"\n") + 1
    try:
        json.loads(content[end:])
    except ValueError:
        return content[:end]
    return content + b"\n"


def link(path: pathlib.Path, other: pathlib.Path) -> None:
    """Gives a complete file a second name, unless that is taken.

    Of many that do this at once, one succeeds.

    Raises:
      FileExistsError: if it is taken.
      OSError: if there are no hard links.
    """
    if not isinstance(other, ObjectPath):
        os.link(path, other)
        return
    with _one_at_a_time:  # `memory://` looks first and writes then
        other.call("pipe_file", path.read_bytes(), mode="create")


def modified(path: pathlib.Path) -> float:
    """Returns when a file was last changed, in seconds of the file server's clock."""
    if isinstance(path, ObjectPath):
        return path.call("modified").timestamp()
    # Opening makes NFS ask for the newest time; a pipe does not block.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def touch(path: pathlib.Path) -> float:
    """Sets when a file was last changed to the file server's time, and returns it.

    Raises:
      FileNotFoundError: if there is none.
    """
    if isinstance(path, ObjectPath):
        replace(path, path.read_bytes())
        return modified(path)
    os.utime(path)
    return path.stat().st_mtime


def remove_tree(path: pathlib.Path, *, ignore_errors: bool = False) -> None:
    """Removes a folder, if it is there, with all that lies in it."""
    if isinstance(path, ObjectPath):
        with contextlib.suppress(*[OSError] * ignore_errors):
            for each in path.walk_files():
                each.unlink(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path, ignore_errors=ignore_errors)


def fuse_mount(path: pathlib.Path, mounts: str = "/proc/self/mounts") -> str:
    """Names the FUSE mount that a path lies on, `fuse.gcsfuse at /data`; else empty.

    Object stores are mounted so: gcsfuse, s3fs, blobfuse2, rclone, mountpoint-s3.
    """
    kind, longest = "", ""
    with contextlib.suppress(OSError):
        for line in pathlib.Path(mounts).read_text(encoding="utf-8").splitlines():
            _, place, its_kind = line.split(" ")[:3]
            place = place.replace("\\040", " ")
            if path.resolve().is_relative_to(place) and len(place) >= len(longest):
                kind, longest = its_kind, place
    return f"{kind} at {longest}" if kind.split(".")[0] == "fuse" else ""
