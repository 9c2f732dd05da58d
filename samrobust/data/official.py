"""CIFAR-10 and CIFAR-100 as published: archives, and checksums of their examples.

A folder named CIFAR-10 may hold anything: a part of it, another order, other labels.
Without a check, numbers from it would pass for results on CIFAR-10.

Reference: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import dataclasses
import hashlib
from typing import NamedTuple

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
      left_out: rows whose official pixels were not available for the checksum, sorted.
    """

    num_examples: int
    num_classes: int
    labels: str
    images: str
    left_out: tuple[int, ...] = ()

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
    splits: dict[str, tuple[str, ...]]
    labels: tuple[tuple[str, str, int], ...]
    label_bytes: tuple[str, ...]
    official: dict[str, OfficialSplit]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def members(self) -> list[str]:
        """The files of the archive that we need."""
        names = [member for _, member, _ in self.labels]
        return names + [
            member for members in self.splits.values() for member in members
        ]

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


def checksum(array: np.ndarray, left_out: tuple[int, ...] = ()) -> str:
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


# fmt: off
_TRAIN_ROWS = (
    1299, 1506, 2110, 3904, 3998, 4298, 5949, 7066, 7237, 7248, 7630, 8006,
    8831, 8968, 9415, 11027, 12762, 12834, 13546, 21493, 25728, 26098, 26927,
    27621, 28435, 28670, 28728, 29694, 29747, 31367, 31462, 31625, 31663, 32777,
    33446, 33641, 33661, 34067, 34276, 34387, 34471, 34825, 35160, 35646, 36733,
    37329, 37474, 37567, 38089, 38384, 38925, 39069, 39358, 39385, 39613, 39840,
    39888, 39971, 41761, 41779, 42004, 42389, 42611, 43357, 43883, 44420, 44882,
    45168, 45240, 46175, 46435, 46538, 46624, 47393, 47597, 48081, 48124, 48333,
    48821, 48836, 49321, 49429, 49631, 49830, 49857,
)
_TEST_ROWS = (
    1259, 1369, 1422, 1556, 2245, 2737, 2935, 3630, 3695, 3718, 4085, 4496,
    5791, 5896, 6286, 7580, 7707, 7724, 7832, 8117, 8541, 8551, 9254,
)
# fmt: on

# Checksums of the official archives' rows. For the rows left out of CIFAR-10's images
# only lossy copies were available; the labels are complete.
CIFAR10 = CifarSpec(
    name="cifar10",
    title="CIFAR-10",
    archive=ArchiveFile(
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
    official={
        "train": OfficialSplit(
            num_examples=50_000,
            num_classes=10,
            labels="2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            images="d2e5fbcf09511024d3186809281ae1882941860681b5b768827897b34f274651",
            left_out=_TRAIN_ROWS,
        ),
        "test": OfficialSplit(
            num_examples=10_000,
            num_classes=10,
            labels="cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
            images="c7ffb6ca70c82d14539d52e61e4ab60bb19053e6b2279e6efa77e5410c802991",
            left_out=_TEST_ROWS,
        ),
    },
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2471, 0.2435, 0.2616),
)
CIFAR100 = CifarSpec(
    name="cifar100",
    title="CIFAR-100",
    archive=ArchiveFile(
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
    official={
        "train": OfficialSplit(
            num_examples=50_000,
            num_classes=100,
            labels="9f11b9f97aad759ba6df0a33e3218b01d8deaf4ed3a14aa1185d69b9ad7ebcb3",
            images="4e457917601a66aed021f5fa37957b56c6319557c0a8ed5484de3c390af45430",
        ),
        "test": OfficialSplit(
            num_examples=10_000,
            num_classes=100,
            labels="4dad7d09c7c97d33f6cb928d705cf4196221316fd6e31bdd978a08ed9103ee0b",
            images="4cb8e5d9309da489bf6b19cc10cd96c3ae6f8daf225380b605aaee4c0d6aee19",
        ),
    },
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)
