"""Image classification data sets as uint8 arrays, all through `load_dataset`.

A data set is three splits of NumPy arrays in a fixed order. The official test split is
never touched; a validation split, if any, is taken from the official training split.
Normalization belongs to the model: images stay uint8, `mean` and `std` travel along.

To add a built-in name, write a module with a `DatasetEntry`, the facts and a function
that loads the data, and add a line to `DATASETS`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from samrobust.checks import check
from samrobust.data import splits
from samrobust.data.folders import PathLike, default_data_dir, local_folder
from samrobust.data.own import load_images, load_npz
from samrobust.data.prepared import (
    describe_folder,
    find_prepared,
    is_tfds_name,
    is_version,
    load_prepared,
)
from samrobust.system.resolve import is_reference, resolve, running

__all__ = ["DATASETS", "dataset_facts", "entry_of", "load_dataset"]

_STREAM_OF_OWN = 0x73616D72  # any number that nobody seeds with


# Built in: where each name's `DatasetEntry` is.
DATASETS = {
    "cifar10": "samrobust.data.cifar:CIFAR10",
    "cifar100": "samrobust.data.cifar:CIFAR100",  # its fine labels
    "digits": "samrobust.data.digits:DIGITS",
}


def entry_of(name: str) -> splits.DatasetEntry:
    """Returns the facts and the loader of one of `DATASETS`."""
    return resolve(DATASETS[name], "a data set")


def dataset_facts(
    name: str,
    *,
    data_dir: PathLike | None = None,
    cache_dir: PathLike | None = None,
) -> splits.DatasetFacts:
    """Returns the facts that a network needs about a data set.

    Reads no image of one of `DATASETS`; loads any other.

    Args:
      name: as in `load_dataset`.
      data_dir: as there.
      cache_dir: as there.

    Returns:
      The attributes of the same names that `load_dataset(name)` has.

    Raises:
      ValueError: as `load_dataset` does.
      DatasetUnavailableError: likewise.

    >>> dataset_facts("digits").image_shape
    (8, 8, 1)
    """
    if name in DATASETS:
        return entry_of(name).facts
    full = load_dataset(name, data_dir=data_dir, cache_dir=cache_dir)
    return splits.DatasetFacts(
        num_classes=full.num_classes,
        image_shape=full.image_shape,
        mean=full.mean,
        std=full.std,
        num_train=len(full.train),
        num_test=len(full.test),
    )


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
) -> splits.Dataset:
    """Loads a data set; the first time it is downloaded, prepared and cached.

    Args:
      name: says where the images come from, in this order:

        - one of `DATASETS`;
        - `package.module:function`, of your own: called without arguments it returns
          the mapping that `from_arrays` takes;
        - a path that ends in `.npz`: the same arrays in a file of `numpy.savez`;
        - a path of a folder, with a slash in it, as `./flowers`: PNG or JPEG files
          `train/CLASS/*` and `test/CLASS/*`, all of one shape, labels by the sorted
          names of the classes;
        - a data set that TFDS has prepared in ArrayRecord format, as `mnist` (its
          newest version), `mnist:3.0.1` or `imagenet_resized/32x32`, with `image`,
          `label`, `train` and `test`.
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
      ValueError: if the name is of none of these forms, a size is out of range, a
        directory is no path of the file system, or the arrays are invalid.
      DatasetUnavailableError: if the data are not there and cannot be downloaded, or
        are damaged or not the official ones.

    Warns:
      UserWarning: if labels and order are CIFAR's, and pixels are not.

    >>> digits = load_dataset("digits", validation_size=97)
    >>> len(digits.train), len(digits.validation), len(digits.test)
    (1200, 97, 500)
    >>> digits.image_shape
    (8, 8, 1)
    """
    check(isinstance(name, str), "text as name", name=name)
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

    # NumPy pads seeds with zeros: [seed, 0] is the stream of `default_rng(seed)`, by
    # which labels of one's own may have been drawn. Built-in data keep their splits.
    stream = split_seed, 0 if name in DATASETS else _STREAM_OF_OWN

    def choose(num_train: int, num_test: int) -> tuple[np.ndarray, ...]:
        return (
            *_choose_train(num_train, validation_size, train_size, stream),
            _choose_test(num_test, test_size, split_seed),
        )

    if name in DATASETS:  # what is out of range is refused before a long download
        facts = entry_of(name).facts
        choose(facts.num_train, facts.num_test)
    full = splits.from_arrays(name, _read(name, **folders))
    kept, held_out, tested = choose(len(full.train), len(full.test))
    return dataclasses.replace(
        full,
        train=_select(full.train, kept),
        validation=_select(full.train, held_out),
        test=_select(full.test, tested),
    )


def _read(
    name: str,
    data_dir: pathlib.Path | None,
    manual_dir: pathlib.Path | None,
    cache_dir: pathlib.Path | None,
) -> Mapping[str, Any]:
    """Returns the arrays of a data set by the form of its name; see `load_dataset`."""
    if name in DATASETS:
        facts, load = entry_of(name)
        arrays = load(data_dir=data_dir, manual_dir=manual_dir, cache_dir=cache_dir)
        known = {key: getattr(facts, key) for key in ("num_classes", "mean", "std")}
        return {**arrays, **known}
    if is_reference(name):
        return _call(name)
    if name.endswith(".npz"):
        return load_npz(local_folder("name", name))
    if "/" in name and (folder := local_folder("name", name)).is_dir():
        return load_images(folder, cache_dir)
    check(
        is_tfds_name(name),
        f"one of {', '.join(DATASETS)}, package.module:function, a file NAME.npz, "
        "a folder ./NAME that is there, or the name of a data set in TFDS",
        name=name,
    )
    stem, _, last = name.rpartition("/")
    fix = f"Write {stem}:{last}."
    check(not is_version(last), "a version of a data set after a colon", fix, name=name)
    data_dir = data_dir or default_data_dir()
    prepared = find_prepared(name, data_dir)
    if prepared is None:
        own = [text for text in (f"{name}.npz", f"./{name}") if os.path.exists(text)]
        meant = f"Did you mean {own[0]}? " if own else ""
        raise splits.DatasetUnavailableError(
            f"Expected {', '.join(DATASETS)}, or {name} in {data_dir} as TFDS prepares "
            f"it in ArrayRecord format, got {describe_folder(name, data_dir)}. "
            f"{meant}Set data_dir (or TFDS_DATA_DIR), or prepare it where TensorFlow "
            f"is installed: tfds.builder({name!r}, file_format='array_record')"
            ".download_and_prepare()."
        )
    return load_prepared(prepared, cache_dir)


def _call(name: str) -> Mapping[str, Any]:
    """Calls the user's function."""
    function = resolve(name, "a data set")
    check(callable(function), "a function", name=name, value=function)
    with running(f"the data set {name}"):
        return function()


def _is_count(value: object) -> bool:
    """Returns whether this is an integer, Python's or NumPy's."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _choose_train(
    available: int,
    validation_size: int,
    train_size: int | None,
    stream: tuple[int, int],
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
        f"There are {available} training examples, {validation_size} held out.",
        train_size=train_size,
        validation_size=validation_size,
    )
    # The raw stream of a bit generator is fixed forever; Generator's methods are not.
    keys = np.random.PCG64(stream).random_raw(available)
    permutation = np.argsort(keys, kind="stable")
    held_out = permutation[available - validation_size :]
    return np.sort(permutation[:train_size]), np.sort(held_out)


def _choose_test(available: int, size: int | None, seed: int) -> np.ndarray:
    """Returns the positions of the test examples."""
    if size is None:
        size = available
    check(
        1 <= size <= available,
        f"1 <= test_size <= {available}",
        f"There are {available} test examples.",
        test_size=size,
    )
    return splits.spread(available, size, seed)


def _select(split: splits.Split, positions: np.ndarray) -> splits.Split:
    """Returns the examples at sorted positions, without a copy if these are all."""
    if len(positions) == len(split):
        return split
    images, labels = split.images[positions], split.labels[positions]
    images.flags.writeable = labels.flags.writeable = False
    return splits.Split(images, labels)
