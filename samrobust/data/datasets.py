"""Image classification data sets as uint8 arrays: one door for all of them.

A data set is three splits of NumPy arrays in a fixed order. The official test split is
never touched; a validation split, if any, is taken from the official training split.
Normalisation belongs to the model: images stay uint8, `mean` and `std` travel along.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from samrobust.checks import check, check_choice
from samrobust.data.cifar import CIFAR10, CIFAR100, load_cifar
from samrobust.data.digits import NUM_TEST, NUM_TRAIN, load_digits
from samrobust.data.folders import PathLike, local_folder
from samrobust.data.splits import Dataset, Split

__all__ = [
    "DATASETS",
    "DatasetFacts",
    "dataset_facts",
    "load_dataset",
]


class DatasetFacts(NamedTuple):
    """What is known of a data set without its images, as in `Dataset`."""

    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def dataset_facts(name: str) -> DatasetFacts:
    """Returns what a network has to know of a data set; reads no image.

    Args:
      name: one of `DATASETS`.

    Returns:
      The attributes of the same names that `load_dataset(name)` has.

    Raises:
      ValueError: if the name is unknown.

    >>> dataset_facts("digits").image_shape
    (8, 8, 1)
    """
    check_choice(DATASETS, name=name)
    return _FACTS[name]


def load_dataset(
    name: str,
    *,
    data_dir: PathLike | None = None,
    manual_dir: PathLike | None = None,
    cache_dir: PathLike | None = None,
    validation_size: int = 0,
    train_size: int | None = None,
    test_size: int | None = None,
    split_seed: int = 0,
) -> Dataset:
    """Loads a data set; the first time it is downloaded, prepared and cached.

    Args:
      name: one of `DATASETS`.
      data_dir: TFDS's directory of prepared data; by default `TFDS_DATA_DIR` or
        ~/tensorflow_datasets, as in TFDS. Prepared data in it are used as they are.
      manual_dir: where the official archive was put, which is not downloaded then; in
        any case it is looked for in `<data_dir>/downloads/manual`.
      cache_dir: for the decoded arrays; by default `$XDG_CACHE_HOME/samrobust/data`.
        In all of them `~` and `$NAME` stand for what they do in a shell.
      validation_size: training examples that are held out.
      train_size: training examples that are kept; None for all that are not held out.
      test_size: test examples that are kept, spread evenly over the official order;
        None for all.
      split_seed: chooses which examples these are.

    Returns:
      The data set. **Guarantees**: the same arguments give the same arrays; no example
      is in two splits; each split keeps the official order; the held-out examples do
      not depend on train_size, nor the test examples on the other sizes; a smaller
      train_size keeps a subset of a larger one's. The arrays are read-only.

    Raises:
      ValueError: if the name is unknown, a size is out of range, or a directory is no
        path of the file system.
      DatasetUnavailableError: if the data are not there and cannot be downloaded, or
        are not the official ones.

    Warns:
      UserWarning: if labels and order are CIFAR's, and pixels are not.

    >>> digits = load_dataset("digits", validation_size=97)
    >>> len(digits.train), len(digits.validation), len(digits.test)
    (1200, 97, 500)
    >>> digits.image_shape
    (8, 8, 1)
    """
    check_choice(DATASETS, name=name)
    sizes = {
        **{"validation_size": validation_size, "split_seed": split_seed},
        **{"train_size": train_size, "test_size": test_size},
    }
    for field, value in sizes.items():
        check(
            _is_count(value)
            or (value is None and field in ("train_size", "test_size")),
            f"an integer as {field}",
            **{field: value},
        )
    check(split_seed >= 0, "0 <= split_seed", split_seed=split_seed)
    given = {"data_dir": data_dir, "manual_dir": manual_dir, "cache_dir": cache_dir}
    folders = {
        folder: None if path is None else local_folder(folder, path)
        for folder, path in given.items()
    }
    num_train, num_test = _num_examples(name)
    kept, held_out = _choose_train(num_train, validation_size, train_size, split_seed)
    tested = _choose_test(num_test, test_size, split_seed)
    splits = DATASETS[name](**folders)  # may take minutes: all else is checked by now
    train, test = Split(*splits["train"]), Split(*splits["test"])
    num_classes, _, mean, std = dataset_facts(name)
    return Dataset(
        name=name,
        num_classes=num_classes,
        mean=mean,
        std=std,
        train=_select(train, kept),
        validation=_select(train, held_out),
        test=_select(test, tested),
    )


def _is_count(value: object) -> bool:
    """Returns whether this is an integer, Python's or NumPy's."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _choose_train(
    available: int, validation_size: int, train_size: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sorted positions of the training and of the validation examples."""
    check(
        0 <= validation_size < available,
        f"0 <= validation_size < {available}",
        f"There are {available} training examples, and training needs one at least.",
        validation_size=validation_size,
    )
    if train_size is None:
        train_size = available - validation_size
    check(
        train_size >= 1 and train_size + validation_size <= available,
        f"1 <= train_size and train_size + validation_size <= {available}",
        "None takes all that are not held out.",
        train_size=train_size,
        validation_size=validation_size,
    )
    # The raw stream of a bit generator is fixed for ever; Generator's methods are not.
    keys = np.random.PCG64([seed, 0]).random_raw(available)
    permutation = np.argsort(keys, kind="stable")
    held_out = permutation[available - validation_size :]
    return np.sort(permutation[:train_size]), np.sort(held_out)


def _choose_test(available: int, size: int | None, seed: int) -> np.ndarray:
    """Returns one random position out of each of `size` equal stretches."""
    if size is None:
        size = available
    check(
        1 <= size <= available,
        f"1 <= test_size <= {available}",
        "None takes all.",
        test_size=size,
    )
    edges = np.arange(size + 1) * available // size
    keys = np.random.PCG64([seed, 1]).random_raw(size)
    return edges[:-1] + (keys % np.diff(edges).astype(np.uint64)).astype(np.int64)


def _select(split: Split, positions: np.ndarray) -> Split:
    """Returns the examples at sorted positions, without a copy if these are all."""
    if len(positions) == len(split):
        return split
    images, labels = split.images[positions], split.labels[positions]
    images.flags.writeable = labels.flags.writeable = False
    return Split(images, labels)


# CIFAR's means and deviations are those that the literature uses.
_FACTS = {
    "cifar10": DatasetFacts(
        10, (32, 32, 3), (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
    ),
    "cifar100": DatasetFacts(
        100, (32, 32, 3), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "digits": DatasetFacts(
        10, (8, 8, 1), (0.30488547288614753,), (0.3758450217031884,)
    ),
}

Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def _num_examples(name: str) -> tuple[int, int]:
    """Returns the sizes of the official training and test splits."""
    if name == "digits":
        return NUM_TRAIN, NUM_TEST
    official = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name].official
    return official["train"].num_examples, official["test"].num_examples


def _cifar10(**folders: pathlib.Path | None) -> Splits:
    """CIFAR-10."""
    return load_cifar(CIFAR10, **folders)


def _cifar100(**folders: pathlib.Path | None) -> Splits:
    """CIFAR-100, with its 100 fine labels."""
    return load_cifar(CIFAR100, **folders)


def _digits(**_: pathlib.Path | None) -> Splits:
    """scikit-learn's digits, which come with it: the directories are not used."""
    splits = load_digits()
    for array in (array for arrays in splits.values() for array in arrays):
        array.flags.writeable = False
    return splits


# Each takes data_dir, manual_dir and cache_dir, and returns the official splits.
DATASETS: dict[str, Callable[..., Splits]] = {
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "digits": _digits,
}
