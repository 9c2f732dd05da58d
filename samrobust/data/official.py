"""CIFAR-10 and CIFAR-100 as published: archives, and checksums of their examples.

A folder named CIFAR-10 may hold anything: a part of it, another order, other labels.
Without a check, numbers from it would pass for results on CIFAR-10.

Reference: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from samrobust.checks import check
from samrobust.data.archive import ArchiveFile
from samrobust.data.splits import DatasetFacts, check_labels

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "IMAGE_SHAPE",
    "VERSION",
    "CifarSpec",
    "OfficialSplit",
    "check_examples",
    "checksum",
]

IMAGE_SHAPE = (32, 32, 3)
VERSION = "3.0.2"  # of TFDS's builders; versions differ in the form of the files only


class OfficialSplit(NamedTuple):
    """Examples of a split in the official order.

    Attributes:
      num_examples: how many.
      num_classes: of the labels.
      labels: their `checksum`.
      images: theirs, without the rows left out.
      left_out: rows whose official pixels were not available for the checksum, only
        lossy copies of them, sorted.
    """

    num_examples: int
    num_classes: int
    labels: str
    images: str
    left_out: Sequence[int] = ()

    def has_images(self, images: np.ndarray) -> bool:
        """Returns whether these are the official images; 150 MB take 0.1 s."""
        return checksum(images, self.left_out) == self.images


@dataclasses.dataclass(frozen=True)
class CifarSpec:
    """Description of one of the two data sets.

    Attributes:
      name: in TFDS.
      title: for people.
      archive: the official archive of the binary version.
      splits: the archive's files of each split, in order.
      labels: key, file of class names and number of classes of each label feature.
      label_bytes: the keys of the bytes before the pixels of a record.
      official: what is known of the examples of each split.
      mean: of each channel of the training images, as the literature has it.
      std: standard deviation, likewise.
    """

    name: str
    title: str
    archive: ArchiveFile
    splits: dict[str, Sequence[str]]
    labels: Sequence[tuple[str, str, int]]
    label_bytes: tuple[str, ...]
    official: dict[str, OfficialSplit]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def facts(self) -> DatasetFacts:
        """The facts that are known without the images."""
        train, test = self.official["train"], self.official["test"]
        return DatasetFacts(
            num_classes=train.num_classes,
            image_shape=IMAGE_SHAPE,
            mean=self.mean,
            std=self.std,
            num_train=train.num_examples,
            num_test=test.num_examples,
        )


def checksum(array: np.ndarray, left_out: Sequence[int] = ()) -> str:
    """Returns the SHA-256 of the rows of an array as bytes, without those left out."""
    content, sha256 = np.ascontiguousarray(array, np.uint8), hashlib.sha256()
    starts = [0, *(row + 1 for row in left_out)]
    for start, stop in zip(starts, [*left_out, len(content)], strict=True):
        sha256.update(content[start:stop].data)
    return sha256.hexdigest()


def check_examples(official: OfficialSplit, arrays: dict[str, np.ndarray]) -> None:
    """Refuses arrays that are not a split's; does not check the images' pixels.

    Args:
      official: the split.
      arrays: images uint8 `[N, H, W, C]` and labels int32 `[N]`, by these names.

    Raises:
      ValueError: for other arrays, another number of examples, shape, type or label.
    """
    expected = {
        "images": ((official.num_examples, *IMAGE_SHAPE), np.dtype(np.uint8)),
        "labels": ((official.num_examples,), np.dtype(np.int32)),
    }
    check(set(arrays) == set(expected), "images and labels", arrays=sorted(arrays))
    for name, (shape, dtype) in expected.items():
        got = {"shape": arrays[name].shape, "dtype": str(arrays[name].dtype)}
        holds = got == {"shape": shape, "dtype": str(dtype)}
        check(holds, f"{name} of shape {shape} and dtype {dtype}", **got)
    check_labels(official.num_classes, labels=arrays["labels"])
    found = checksum(arrays["labels"])
    check(
        found == official.labels,
        f"the official labels in the official order, sha256={official.labels[:16]}",
        sha256=found[:16],
    )


def _known(name: str) -> CifarSpec:
    """Reads the description of a data set from `official.json`, beside this file."""
    text = pathlib.Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
    fields: dict[str, Any] = json.loads(text)[name]
    fields["archive"] = ArchiveFile(**fields["archive"])
    fields["official"] = {n: OfficialSplit(**x) for n, x in fields["official"].items()}
    fields |= {moment: tuple(fields[moment]) for moment in ("mean", "std")}
    return CifarSpec(**fields)


CIFAR10, CIFAR100 = _known("cifar10"), _known("cifar100")
