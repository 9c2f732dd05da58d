"""Data sets that TFDS has prepared as ArrayRecord: found, told apart and decoded."""

import hashlib
import io
import logging
import pathlib
import re
from typing import Any

import numpy as np

from samrobust.files import glance

__all__ = ["VERSION", "decode", "file_formats", "find_prepared", "records_identity"]

VERSION = "3.0.2"  # of TFDS's builders; versions differ in the form of the files only
_CHUNK = 1000  # records read at a time
_DECODING = 1  # to be raised when the same records become other arrays
_MAX_MESSAGE = 300  # characters of an error that is not ours

logger = logging.getLogger(__name__)


def find_prepared(name: str, data_dir: pathlib.Path) -> pathlib.Path | None:
    """Returns the directory of finished ArrayRecord data: 3.0.2, else the newest."""

    def preference(path: pathlib.Path) -> tuple[bool, list[int]]:
        return path.name == VERSION, [int(part) for part in path.name.split(".")]

    directories = (data_dir / name).glob("*.*.*")
    # TFDS writes into incomplete.XXXXXX_3.0.2 and renames it when all is there.
    versions = [
        path for path in directories if re.fullmatch(r"\d+\.\d+\.\d+", path.name)
    ]
    for path in sorted(versions, key=preference, reverse=True):
        if "array_record" in file_formats(path):
            return path
    return None


def file_formats(prepared: pathlib.Path) -> list[str]:
    """Returns the file formats that TFDS notes there; none if the note is damaged."""
    info = glance(prepared / "dataset_info.json")
    others = info.get("alternativeFileFormats")
    formats = [info.get("fileFormat"), *(others if isinstance(others, list) else [])]
    return [name for name in formats if isinstance(name, str)]


def records_identity(prepared: pathlib.Path, split: str) -> dict[str, Any]:
    """Returns what the decoded arrays are a function of; 130 MB take 0.1 s.

    By content: a copy of the data elsewhere shares their cache, and other data under
    the same name and time have their own.
    """
    records = {}
    for path in sorted(prepared.glob(f"*-{split}.array_record*")):
        with path.open("rb") as file:
            records[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"decoding": _DECODING, "records": records}


def decode(prepared: pathlib.Path, split: str) -> dict[str, np.ndarray]:
    """Reads a split, in the order of the ids: on disk the order is hashed."""
    import tensorflow_datasets as tfds
    from PIL import Image

    logger.info("Decoding %s of %s", split, prepared)
    try:
        builder = tfds.builder_from_directory(prepared, file_format="array_record")
        # TFDS's own decoding takes twice the time, and asks for OpenCV in the log.
        decoders = {"image": tfds.decode.SkipDecoding()}
        source = builder.as_data_source(
            split=split,  # pyright: ignore[reportCallIssue] - hidden by decorators
            decoders=decoders,
        )
        ids, images, labels = [], [], []
        for start in range(0, len(source), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(source)))
            for record in source.__getitems__(chunk):
                ids.append(record["id"])
                images.append(np.asarray(Image.open(io.BytesIO(record["image"]))))
                labels.append(record["label"])
        order = np.argsort(ids, kind="stable")
        arrays = {"images": np.stack(images), "labels": np.array(labels, np.int32)}
    except Exception as error:  # TFDS and its readers raise anything on damaged files
        text = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_MESSAGE]
        raise ValueError(f"{text}.") from error
    return {name: array[order] for name, array in arrays.items()}
