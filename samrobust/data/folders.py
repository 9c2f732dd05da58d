"""Folders named by settings and the environment, as full local paths.

TFDS reads from buckets through TensorFlow, which is not used here: an address that is
no path of the file system is refused instead of becoming a folder of that name.
"""

import os
import pathlib
import re

from samrobust.checks import check

__all__ = ["PathLike", "default_data_dir", "local_folder"]

PathLike = str | os.PathLike[str]


def local_folder(name: str, path: PathLike) -> pathlib.Path:
    """Returns the folder that a setting names, which need not exist.

    Args:
      name: of the setting, for the message.
      path: its value; `~`, `$NAME` and `${NAME}` stand for what they do in a shell.

    Raises:
      ValueError: if it is empty or an address, or a user or variable in it is unknown.

    >>> local_folder("data_dir", "gs://bucket/data")
    Traceback (most recent call last):
    samrobust.checks.CheckError: Expected a path of the file system as data_dir, got \
data_dir='gs://bucket/data'. Copy or mount it, and name that folder.
    """
    got = {name: path}
    check(isinstance(path, str | os.PathLike), f"a path as {name}", **got)
    text = os.path.expandvars(os.path.expanduser(str(os.fspath(path))))
    check(
        bool(text.strip()) and "\0" not in text,
        f"the name of a folder as {name}",
        "Leave it out for the default.",
        **got,
    )
    check(
        re.match(r"[A-Za-z][\w+.-]+:/", text) is None,
        f"a path of the file system as {name}",
        "Copy or mount it, and name that folder.",
        **got,
    )
    check(
        re.match("~", text) is None and re.search(r"\$[\w{]", text) is None,
        f"users and variables that are known in {name}",
        "Write the path in full.",
        **got,
    )
    return pathlib.Path(text)


def default_data_dir() -> pathlib.Path:
    """Returns TFDS's directory: `$TFDS_DATA_DIR`, or its default at home."""
    root = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return local_folder("TFDS_DATA_DIR", root)
