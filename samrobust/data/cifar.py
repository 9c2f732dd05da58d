"""CIFAR-10 and CIFAR-100 through TensorFlow Datasets, without TensorFlow.

Data that TFDS has prepared as ArrayRecord are read as they are. Otherwise the official
archive is written in that form first, once. The decoded arrays are cached; as long as
the cache is intact TFDS is not even imported.
"""

import contextlib
import dataclasses
import fcntl
import io
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from samrobust.data.archive import Archive, DatasetUnavailableError, find_archive
from samrobust.data.cache import cached_arrays

__all__ = ["CIFAR10", "CIFAR100", "CifarSpec", "default_data_dir", "load_cifar"]

_VERSION = "3.0.2"  # of TFDS's builders; versions differ in the form of the files only
_CHUNK = 1000  # records read at a time

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CifarSpec:
    """What tells the two data sets apart.

    Attributes:
      name: in TFDS.
      title: for people.
      archive: the official archive of the binary version.
      splits: the archive's files of each split, in order.
      labels: key, file of class names and number of classes of each label feature.
      label_bytes: the keys of the bytes before the pixels of a record.
    """

    name: str
    title: str
    archive: Archive
    splits: dict[str, tuple[str, ...]]
    labels: tuple[tuple[str, str, int], ...]
    label_bytes: tuple[str, ...]

    @property
    def members(self) -> list[str]:
        """All files of the archive that we need."""
        names = [member for _, member, _ in self.labels]
        return names + [
            member for members in self.splits.values() for member in members
        ]


CIFAR10 = CifarSpec(
    name="cifar10",
    title="CIFAR-10",
    archive=Archive(
        name="cifar-10-binary.tar.gz",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        num_bytes=170052171,
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
    splits={
        "train": tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)),
        "test": ("cifar-10-batches-bin/test_batch.bin",),
    },
    labels=(("label", "cifar-10-batches-bin/batches.meta.txt", 10),),
    label_bytes=("label",),
)
CIFAR100 = CifarSpec(
    name="cifar100",
    title="CIFAR-100",
    archive=Archive(
        name="cifar-100-binary.tar.gz",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        num_bytes=168513733,
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    ),
    splits={
        "train": ("cifar-100-binary/train.bin",),
        "test": ("cifar-100-binary/test.bin",),
    },
    labels=(
        ("label", "cifar-100-binary/fine_label_names.txt", 100),
        ("coarse_label", "cifar-100-binary/coarse_label_names.txt", 20),
    ),
    label_bytes=("coarse_label", "label"),
)


def default_data_dir() -> pathlib.Path:
    """Returns the directory that TFDS uses: `$TFDS_DATA_DIR` or its place at home."""
    root = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(root).expanduser()


def load_cifar(
    spec: CifarSpec,
    data_dir: pathlib.Path,
    manual_dir: pathlib.Path | None,
    cache_dir: pathlib.Path,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the official splits in the official order, preparing them if need be.

    Args:
      spec: which data set.
      data_dir: the TFDS directory.
      manual_dir: where the user put the archive, if anywhere.
      cache_dir: for the decoded arrays.

    Returns:
      `{"train": (images, labels), "test": (images, labels)}`, images uint8
      `[N, 32, 32, 3]` and labels int32 `[N]`, read-only and if possible memory-mapped.

    Raises:
      DatasetUnavailableError: if there are no data, or they cannot be read.
    """
    prepared = _find_prepared(spec.name, data_dir)
    if prepared is None:
        prepared = _prepare(spec, data_dir, manual_dir)
    splits = {}
    for split in ("train", "test"):
        arrays = cached_arrays(
            cache_dir,
            f"{spec.name}-{prepared.name}-{split}",
            _identity(prepared, split),
            lambda split=split: _decode(prepared, split),
        )
        splits[split] = (arrays["images"], arrays["labels"])
    return splits


def _find_prepared(name: str, data_dir: pathlib.Path) -> pathlib.Path | None:
    """Returns the directory of finished ArrayRecord data: 3.0.2, else the newest."""

    def preference(path: pathlib.Path) -> tuple[bool, list[int]]:
        return path.name == _VERSION, [int(part) for part in path.name.split(".")]

    directories = (data_dir / name).glob("*.*.*")
    # TFDS writes into incomplete.XXXXXX_3.0.2 and renames it when all is there.
    versions = [
        path for path in directories if re.fullmatch(r"\d+\.\d+\.\d+", path.name)
    ]
    for path in sorted(versions, key=preference, reverse=True):
        info = path / "dataset_info.json"
        if info.is_file():
            content = json.loads(info.read_text())
            formats = content.get("alternativeFileFormats", [])
            if "array_record" in [content.get("fileFormat"), *formats]:
                return path
    return None


def _prepare(
    spec: CifarSpec, data_dir: pathlib.Path, manual_dir: pathlib.Path | None
) -> pathlib.Path:
    """Writes the data set from its archive, and returns its directory."""
    target = data_dir / spec.name / _VERSION
    remedy = (
        f"Or set data_dir (or TFDS_DATA_DIR) to a directory with {spec.name}/"
        f"{_VERSION}, prepared by TFDS in ArrayRecord format."
    )
    if target.exists():
        raise DatasetUnavailableError(
            f"Expected ArrayRecord data of {spec.name}, got {target} in another format "
            f"or unfinished. Delete it, to have it written anew. {remedy}"
        )
    try:
        with _one_process_at_a_time(data_dir / "downloads" / f"{spec.name}.lock"):
            if (prepared := _find_prepared(spec.name, data_dir)) is not None:
                return prepared  # another process was faster
            archive = find_archive(spec.archive, data_dir / "downloads", manual_dir)
            from samrobust.data.cifar_builder import CifarBuilder

            CifarBuilder(spec, archive, data_dir).download_and_prepare()
    except DatasetUnavailableError as error:
        raise DatasetUnavailableError(f"{error} {remedy}") from error
    except OSError as error:
        # Without locks another machine may have been faster: then the rename fails.
        if _find_prepared(spec.name, data_dir) is None:
            raise DatasetUnavailableError(
                f"Expected to write {spec.name} to {data_dir}, got: {error}. Set "
                f"data_dir to a directory that can be written. {remedy}"
            ) from error
    return target


@contextlib.contextmanager
def _one_process_at_a_time(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock on a file; the system lets go of it if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            logger.warning("No lock on %s: %s", path, error)
        yield


def _identity(prepared: pathlib.Path, split: str) -> dict[str, Any]:
    """Returns what changes when the prepared data change, as JSON values."""
    stats = {
        path.name: path.stat() for path in prepared.glob(f"*-{split}.array_record*")
    }
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return {"directory": str(prepared.resolve()), "files": files}


def _decode(prepared: pathlib.Path, split: str) -> dict[str, np.ndarray]:
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
    except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise DatasetUnavailableError(
            f"Expected {split} examples in {prepared}, got: {error!r}. Delete the "
            "directory, to have it written anew."
        ) from error
    return {name: array[order] for name, array in arrays.items()}
