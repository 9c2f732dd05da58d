"""Data sets that TFDS has prepared as ArrayRecord: found, identified, decoded.

Decoded arrays are cached by the content of the records. Nothing is downloaded, and TFDS
is imported without TensorFlow.
"""

import io
import logging
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from samrobust.checks import shorten
from samrobust.data.cache import Arrays, cached_arrays, default_cache_dir
from samrobust.data.own import DECODING, one_line, read_image
from samrobust.data.splits import DatasetUnavailableError
from samrobust.system import files
from samrobust.system.files import glance

__all__ = [
    "describe_folder",
    "file_formats",
    "find_prepared",
    "is_tfds_name",
    "is_version",
    "load_prepared",
    "read_split",
]

_CHUNK = 1000  # records read at a time
_VERSION = r"\d+\.\d+\.\d+"

logger = logging.getLogger(__name__)


def is_tfds_name(name: str) -> bool:
    """Returns whether this can name a data set of TFDS: `name/config:version`.

    >>> is_tfds_name("mnist:3.0.1"), is_tfds_name("imagenet_resized/32x32")
    (True, True)
    """
    form = rf"[a-z]\w*(/[\w.-]+)?(:{_VERSION})?"
    return re.fullmatch(form, name) is not None


def is_version(text: str) -> bool:
    """Returns whether this is a version of a data set, as TFDS writes it."""
    return re.fullmatch(_VERSION, text) is not None


def find_prepared(
    name: str, data_dir: pathlib.Path, preferred: str = ""
) -> pathlib.Path | None:
    """Returns the directory of finished ArrayRecord data: preferred, else the newest.

    Args:
      name: of the data set in TFDS; with a version, that one alone.
      data_dir: TFDS's directory.
      preferred: a version.
    """
    name, _, version = name.partition(":")

    def preference(path: pathlib.Path) -> tuple[bool, list[int]]:
        return path.name == preferred, [int(part) for part in path.name.split(".")]

    for path in sorted(_versions(data_dir / name), key=preference, reverse=True):
        if version in ("", path.name) and "array_record" in file_formats(path):
            return path
    return None


def _versions(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders of finished versions of a data set.

    TFDS writes into incomplete.XXXXXX_3.0.2 and renames it when all is there.
    """
    paths = folder.glob("*.*.*")
    return [path for path in paths if is_version(path.name)]


def file_formats(prepared: pathlib.Path) -> list[str]:
    """Returns the file formats that TFDS notes there; none if the note is damaged."""
    info = glance(prepared / "dataset_info.json")
    others = info.get("alternativeFileFormats")
    formats = [info.get("fileFormat"), *(others if isinstance(others, list) else [])]
    return [name for name in formats if isinstance(name, str)]


def describe_folder(name: str, data_dir: pathlib.Path) -> str:
    """Describes, for a message, what is there instead of prepared data."""
    name = name.partition(":")[0]
    found = [
        f"{name}:{path.name} as {form}"
        for path in _versions(data_dir / name)
        for form in file_formats(path)
    ]
    if found:
        return shorten(", ".join(found))
    paths = [*data_dir.glob("*/*.*.*"), *data_dir.glob("*/*/*.*.*")]
    others = {
        str(path.parent.relative_to(data_dir))
        for path in paths
        if "array_record" in file_formats(path)
    }
    return shorten(", ".join(sorted(others))) or "nothing of the kind"


def load_prepared(
    prepared: pathlib.Path, cache_dir: pathlib.Path | None
) -> dict[str, Any]:
    """Returns the arrays of any image classification data set that TFDS prepared.

    Examples are in the order of their `id`, where they have one, and of the records.

    Args:
      prepared: the directory of a version.
      cache_dir: for the decoded arrays; None for the default.

    Raises:
      DatasetUnavailableError: if it has no splits `train` and `test` or features
        `image` and `label`, or is damaged; says what was found.
    """
    try:
        num_classes = _num_classes(prepared)
        train, test = (
            read_split(prepared, split, cache_dir) for split in ("train", "test")
        )
    except (OSError, ValueError) as error:
        raise DatasetUnavailableError(
            f"Expected images and labels in {prepared}, got: {error}"
        ) from error
    return {
        **{"x_train": train["images"], "y_train": train["labels"]},
        **{"x_test": test["images"], "y_test": test["labels"]},
        "num_classes": num_classes,
    }


def _num_classes(prepared: pathlib.Path) -> int:
    """Returns the number of classes, after checks of splits and features.

    Raises:
      ValueError: for other splits or features; in one line.
    """
    import tensorflow_datasets as tfds

    try:
        info: Any = tfds.builder_from_directory(prepared).info
        splits, features = sorted(info.splits), dict(info.features or {})
    except Exception as error:  # TFDS raises anything on damaged files
        raise ValueError(f"{one_line(error)}.") from error
    image, label = features.get("image"), features.get("label")
    if (
        not {"train", "test"} <= {*splits}
        or not isinstance(image, tfds.features.Image)
        or not isinstance(label, tfds.features.ClassLabel)
    ):
        kinds = {name: type(features[name]).__name__ for name in sorted(features)}
        raise ValueError(
            f"splits {splits} and features {kinds}. Wanted are train and test, image "
            "and label (a ClassLabel): write a function of your own for others."
        )
    return int(label.num_classes or 0)


def read_split(
    prepared: pathlib.Path,
    split: str,
    cache_dir: pathlib.Path | None,
    *,
    verify: Callable[[Arrays], None] = lambda _: None,
) -> Arrays:
    """Returns `images` and `labels` of a split, decoded or out of the cache.

    The cache is found by the records' content: a copy of the data elsewhere shares it,
    and other data under the same name have their own. To hash 130 MB takes 0.1 s.
    Records are the files with the split in their names, as TFDS's templates have it;
    without one nothing is cached.

    Args:
      prepared: the directory of a version.
      split: `train` or `test`.
      cache_dir: for the decoded arrays; None for the default.
      verify: raises `ValueError` for arrays that cannot be right.

    Raises:
      ValueError: if the records cannot be decoded, in one line, or verify refuses.
    """
    records = {
        name: files.digest(path)
        for path in prepared.rglob("*")
        if split in (name := path.relative_to(prepared).as_posix()) and path.is_file()
    }
    source = {"decoding": DECODING, "records": records}
    stem = f"{prepared.parent.name}-{split}"
    folder = (cache_dir or default_cache_dir()) if records else None
    return cached_arrays(folder, stem, source, lambda: _decode(prepared, split), verify)


def _decode(prepared: pathlib.Path, split: str) -> Arrays:
    """Reads a split in the order of its ids: on disk the order is hashed."""
    import tensorflow_datasets as tfds

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
            for index, record in zip(chunk, source.__getitems__(chunk), strict=True):
                ids.append(record.get("id", index))
                images.append(read_image(io.BytesIO(record["image"])))
                labels.append(record["label"])
        order = np.argsort(ids, kind="stable")
        arrays = {"images": np.stack(images), "labels": np.array(labels, np.int32)}
    except Exception as error:  # TFDS and its readers raise anything on damaged files
        raise ValueError(f"{one_line(error)}.") from error
    return {name: array[order] for name, array in arrays.items()}
