"""The examples of a data set: three splits of arrays, and their fingerprints.

Every source is loaded into one mapping: the arrays `x_train`, `y_train`,
`x_test` and `y_test`, and perhaps `mean`, `std` and `num_classes`.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from samrobust.checks import check, naming

__all__ = [
    "Dataset",
    "DatasetEntry",
    "DatasetFacts",
    "DatasetUnavailableError",
    "Split",
    "check_labels",
    "fingerprint",
    "from_arrays",
    "spread",
]

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_FACTS = ("mean", "std", "num_classes")
_CHUNK = 256  # images whose squares are held at a time
_LEAST_STD = 1e-6  # of pixels in [0, 1], which are divided by it


class DatasetUnavailableError(RuntimeError):
    """The data are not there or damaged; the message says what to put where."""


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 `[N, H, W, C]` and their labels, integers `[N]`.

    Raises:
      ValueError: for other types, shapes, another number of labels than of images, or
        negative labels.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        _check_arrays(images=self.images, labels=self.labels)
        negative = np.min(self.labels, initial=0)
        check(negative >= 0, "0 <= labels", least=int(negative))

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def _fingerprint(self) -> str:
        """Hashes both arrays once; 150 MB take 0.1 s."""
        sha256 = hashlib.sha256()
        for array in (self.images, self.labels):
            sha256.update(f"{array.dtype}{array.shape}".encode())
            sha256.update(np.ascontiguousarray(array).data)
        return sha256.hexdigest()[:16]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set.

    Attributes:
      name: as given to `load_dataset`.
      num_classes: labels are in 0..num_classes - 1.
      mean: of each channel over the official training images, of pixels in [0, 1].
      std: standard deviation, likewise.
      train: to train on.
      validation: held out from the official training images; may be empty.
      test: from the official test images.

    Raises:
      ValueError: for a label out of range, or images of different shapes.
    """

    name: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    validation: Split
    test: Split

    def __post_init__(self) -> None:
        shape = self.image_shape
        for split in (self.train, self.validation, self.test):
            found = split.images.shape[1:]
            check(found == shape, f"images of shape {shape} in all splits", shape=found)
            check_labels(self.num_classes, labels=split.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels


class DatasetFacts(NamedTuple):
    """Facts of a data set that are known without its images.

    Attributes:
      num_classes: labels are in 0..num_classes - 1.
      image_shape: height, width and channels.
      mean: of each channel, of pixels in [0, 1].
      std: standard deviation, likewise.
      num_train: official training images, those that may be held out included.
      num_test: official test images.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_train: int
    num_test: int


class DatasetEntry(NamedTuple):
    """A built-in data set.

    Attributes:
      facts: known without reading an image.
      load: takes `data_dir`, `manual_dir` and `cache_dir`, paths or None, and returns
        `x_train`, `y_train`, `x_test` and `y_test` as `from_arrays` takes them.
    """

    facts: DatasetFacts
    load: Callable[..., Mapping[str, Any]]


def spread(available: int, size: int, seed: int = 0) -> np.ndarray:
    """Returns one random position out of each of `size` equal stretches, int [size].

    Ascending, and all where as many are available: an order that repeats, as classes in
    turn, shows up in them no more than by chance.

    Raises:
      ValueError: if fewer are available.

    >>> spread(4, 4).tolist()
    [0, 1, 2, 3]
    """
    check(0 <= size <= available, f"0 <= size <= {available}", size=size)
    edges = np.arange(size + 1) * available // max(size, 1)
    keys = np.random.PCG64([seed, 1]).random_raw(size)
    return edges[:-1] + (keys % np.diff(edges).astype(np.uint64)).astype(np.int64)


def fingerprint(split: Split) -> str:
    """Returns a checksum of a split's images and labels, in their order.

    It is computed once for each `Split`.

    Returns:
      16 hexadecimal digits. **Guarantees**: another pixel, label, order, size, shape or
      type of an array gives other digits; directories, cache and machine do not
      matter.

    >>> fingerprint(Split(np.zeros([2, 1, 1, 1], np.uint8), np.arange(2)))
    '19ff28aa00c923e9'
    """
    return split._fingerprint


def from_arrays(name: str, arrays: Mapping[str, Any]) -> Dataset:
    """Builds a data set, all of it for training and testing, from checked arrays.

    Args:
      name: of the data set; it begins every message.
      arrays: `x_train` and `x_test`, uint8 `[N, H, W, C]`; `y_train` and `y_test`,
        integers `[N]` in 0..num_classes - 1; perhaps `num_classes`, else 1 more than
        the largest label of `y_train`, which then has every class; perhaps `mean` and
        `std` `[C]` of pixels in [0, 1], else those of all of `x_train`.

    Returns:
      The data set, its arrays read-only and its labels int32. **Guarantees**: a
      computed mean and std are functions of the pixels alone, the same on every
      machine.

    Raises:
      ValueError: for anything else; names the data set, the array and what to do.

    >>> pixels, labels = np.eye(2, dtype=np.uint8).reshape(2, 2, 1, 1), np.arange(2)
    >>> arrays = {"x_train": pixels, "y_train": labels}
    >>> flags = from_arrays("flags", {**arrays, "x_test": pixels, "y_test": labels})
    >>> flags.num_classes, flags.image_shape, len(flags.validation)
    (2, (2, 1, 1), 0)
    """
    with naming(name):
        check(
            isinstance(arrays, Mapping)
            and set(_ARRAYS) <= set(arrays) <= {*_ARRAYS, *_FACTS},
            f"{', '.join(_ARRAYS)}, and at most {', '.join(_FACTS)} beside them",
            arrays=list(arrays) if isinstance(arrays, Mapping) else arrays,
        )
        x_train, y_train, x_test, y_test = (_array(arrays, key) for key in _ARRAYS)
        _check_arrays(x_train=x_train, y_train=y_train)
        _check_arrays(x_test=x_test, y_test=y_test)
        for key, images in (("x_train", x_train), ("x_test", x_test)):
            shape = images.shape
            check(images.size > 0, f"images in {key}", shape=shape)
            fix = f"Move the channels last: {key}.transpose(0, 2, 3, 1)."
            is_last = shape[3] <= 4 or shape[1] not in (1, 3)
            check(is_last, f"{key} [N, H, W, C]", fix, shape=shape)
        shape = x_train.shape[1:]
        check(
            x_test.shape[1:] == shape,
            f"images of shape {shape} in x_test as in x_train",
            "Resize or pad all images to one shape.",
            shape=x_test.shape[1:],
        )
        num_classes = _num_classes(arrays.get("num_classes"), y_train)
        check_labels(num_classes, y_train=y_train)
        check_labels(num_classes, y_test=y_test)
        mean, std = _mean_and_std(arrays, x_train)
    train, test = _frozen(x_train, y_train), _frozen(x_test, y_test)
    none = Split(train.images[:0], train.labels[:0])
    return Dataset(name, num_classes, mean, std, train, none, test)


def _array(arrays: Mapping[str, Any], key: str) -> np.ndarray:
    try:
        return np.asarray(arrays[key])
    except ValueError:
        check(False, f"one shape in all of {key}", type=type(arrays[key]).__name__)
        raise


def _check_arrays(**pair: np.ndarray) -> None:
    """Refuses what are not the images and the labels of a split, by these names."""
    for name, array in pair.items():
        is_array = hasattr(array, "dtype") and hasattr(array, "shape")
        check(is_array, f"an array of {name}", type=type(array).__name__)
    (name, images), (labels_name, labels) = pair.items()
    fix = ""
    if images.ndim == 3:
        fix = f"Add the channel axis: {name}[..., None]."
    elif images.dtype.kind == "f":
        fix = f"Pixels in [0, 1] become np.round(255 * {name}).astype(np.uint8)."
    elif images.dtype.kind in "iu":
        fix = f"Pixels in 0..255 become {name}.astype(np.uint8)."
    check(
        images.ndim == 4 and images.dtype == np.uint8,
        f"{name} uint8 [N, H, W, C]",
        fix,
        shape=images.shape,
        dtype=str(images.dtype),
    )
    fix = ""
    if labels.ndim == 2:
        one = "[:, 0]" if labels.shape[1] == 1 else ".argmax(1)"
        fix = f"A row a label becomes {labels_name}{one}."
    if labels.dtype.kind in "US":
        fix = f"Names become np.unique({labels_name}, return_inverse=True)[1]."
    check(
        labels.shape == images.shape[:1] and np.issubdtype(labels.dtype, np.integer),
        f"integer {labels_name} [{len(images)}], one an image",
        fix,
        shape=labels.shape,
        dtype=str(labels.dtype),
    )


def check_labels(num_classes: int, /, **arrays: np.ndarray) -> None:
    """Refuses an array with a label that is not in 0..num_classes - 1."""
    for name, labels in arrays.items():
        labels = np.asarray(labels)
        wrong = labels[(labels < 0) | (labels >= num_classes)][:3].tolist()
        check(not wrong, f"{name} in 0..{num_classes - 1}", **{name: wrong})


def _num_classes(given: Any, labels: np.ndarray) -> int:
    """Returns the number of classes: as given, or of labels without a gap."""
    if given is not None:
        number = np.asarray(given)
        holds = number.ndim == 0 and np.issubdtype(number.dtype, np.integer)
        holds = holds and int(number) >= 2
        check(holds, "an integer 2 <= num_classes", num_classes=given)
        return int(number)
    check_labels(2**31, y_train=labels)
    found = np.unique(labels)
    missing = np.flatnonzero(found != np.arange(len(found)))[:1].tolist()
    check(
        not missing and len(found) >= 2,
        "every class of 0, 1, ... among y_train, and two at least",
        "Number the classes from 0 without a gap, or give num_classes.",
        missing=missing or [1],
    )
    return len(found)


def _mean_and_std(
    arrays: Mapping[str, Any], images: np.ndarray
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation by channel: given, or of the images."""
    given = [name for name in ("mean", "std") if arrays.get(name) is not None]
    check(len(given) != 1, "mean and std, or neither", given=given)
    if not given:
        return _moments(images)
    channels = images.shape[3]
    mean, std = (np.asarray(arrays[name]).ravel() for name in ("mean", "std"))
    fix = "Of pixels in [0, 1], not 0..255."
    for name, values, least in (("mean", mean, 0.0), ("std", std, _LEAST_STD)):
        holds = (
            values.dtype.kind in "fiu"
            and values.shape == (channels,)
            and bool(((least <= values) & (values <= 1)).all())
        )
        wanted = f"{least:g} <= {name} <= 1 for each of {channels} channels"
        check(holds, wanted, fix, **{name: values.tolist()})
    return tuple(map(float, mean)), tuple(map(float, std))


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation by channel, of pixels in [0, 1].

    The sums are of integers, so exact, in any order and on any machine.
    """
    channels = images.shape[3]
    total, squares = [0] * channels, [0] * channels
    for start in range(0, len(images), _CHUNK):
        pixels = images[start : start + _CHUNK].reshape(-1, channels).astype(np.uint32)
        for i in range(channels):
            total[i] += int(pixels[:, i].sum(dtype=np.uint64))
            squares[i] += int(np.square(pixels[:, i]).sum(dtype=np.uint64))
    count = images.size // channels
    mean = tuple(t / (255 * count) for t in total)
    std = tuple(
        math.sqrt(count * s - t * t) / (255 * count)
        for t, s in zip(total, squares, strict=True)
    )
    fix = "Leave constant channels out, or give mean and std."
    check(min(std) >= _LEAST_STD, "channels of x_train that vary", fix, std=std)
    return mean, std


def _frozen(images: np.ndarray, labels: np.ndarray) -> Split:
    """Returns a split that cannot be written to; the caller's arrays still can."""
    images, labels = images.view(), labels.astype(np.int32, copy=False).view()
    images.flags.writeable = labels.flags.writeable = False
    return Split(images, labels)
