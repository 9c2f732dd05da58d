"""A `gcsfs` without a cloud, for processes that share buckets: each is a folder.

Buckets lie in `$GCS_STAND_IN`. As in the store, an object is there whole or not at all,
and one of many creations on condition succeeds. A file `hang_at` there is a pattern of
names, as `bucket/runs/result.json`, that no upload gets beyond; `hanging` is there once
one waits.
"""

import os
import pathlib
import re
import time
import uuid
from typing import Any

from fsspec.implementations.local import LocalFileSystem

__all__ = ["GCSFileSystem"]


class GCSFileSystem(LocalFileSystem):
    """Google Cloud Storage."""

    protocol = "gs"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        text = str(path)
        if text.startswith("gs://"):
            text = f"{os.environ['GCS_STAND_IN']}/{text.removeprefix('gs://')}"
        return text.rstrip("/")

    def pipe_file(
        self, path: str, value: bytes, mode: str = "overwrite", **_: Any
    ) -> None:
        """Puts an object."""
        place = pathlib.Path(self._strip_protocol(path))
        place.parent.mkdir(parents=True, exist_ok=True)
        store = pathlib.Path(os.environ["GCS_STAND_IN"])
        arriving, hang_at = store / f".{uuid.uuid4().hex}", store / "hang_at"
        name = str(place.relative_to(store))
        while hang_at.exists() and re.fullmatch(hang_at.read_text(), name):
            (store / "hanging").touch()
            time.sleep(0.02)
        arriving.write_bytes(value)
        if mode == "overwrite":
            arriving.replace(place)
        else:
            try:
                os.link(arriving, place)
            finally:
                arriving.unlink()

    def put_file(self, path1: str, path2: str, *_: Any, **__: Any) -> None:
        """Puts a local file."""
        self.pipe_file(path2, pathlib.Path(path1).read_bytes())
