"""The official examples of a data set, known by their checksums.

A folder that says CIFAR-10 may hold anything: a part of it, another order, other
labels. The numbers made with it would pass for results on CIFAR-10.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from samrobust.checks import check
from samrobust.data.splits import check_labels

__all__ = [
    "CIFAR10_SPLITS",
    "CIFAR100_SPLITS",
    "OfficialSplit",
    "check_examples",
    "checksum",
]


class OfficialSplit(NamedTuple):
    """The examples of a split in the official order.

    Attributes:
      num_examples: how many.
      num_classes: of the labels.
      labels: their `checksum`.
      images: theirs, without the rows left out.
      left_out: rows whose official pixels were not at hand for the checksum, sorted.
    """

    num_examples: int
    num_classes: int
    labels: str
    images: str
    left_out: tuple[int, ...] = ()

    def has_images(self, images: np.ndarray) -> bool:
        """Returns whether these are the official images; 150 MB take 0.1 s."""
        return checksum(images, self.left_out) == self.images


def checksum(array: np.ndarray, left_out: tuple[int, ...] = ()) -> str:
    """Returns the SHA-256 of the rows of an array as bytes, without those left out."""
    content, sha256 = np.ascontiguousarray(array, np.uint8), hashlib.sha256()
    starts = [0, *(row + 1 for row in left_out)]
    for start, stop in zip(starts, [*left_out, len(content)], strict=True):
        sha256.update(content[start:stop].data)
    return sha256.hexdigest()


def check_examples(
    official: OfficialSplit,
    image_shape: tuple[int, int, int],
    arrays: dict[str, np.ndarray],
) -> None:
    """Refuses arrays that are not a split's, but for the images' pixels.

    Args:
      official: the split.
      image_shape: of an image.
      arrays: images uint8 `[N, H, W, C]` and labels int32 `[N]`, by these names.

    Raises:
      ValueError: for other arrays, another number of examples, shape, type or label.
    """
    expected = {
        "images": ((official.num_examples, *image_shape), np.dtype(np.uint8)),
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

# Of the official archives, row by row. Of CIFAR-10's rows left out there were copies
# with a loss at hand only; the labels are without gap.
CIFAR10_SPLITS = {
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
}
CIFAR100_SPLITS = {
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
}
