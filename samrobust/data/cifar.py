"""CIFAR-10 and CIFAR-100 through TensorFlow Datasets, without TensorFlow.

Data that TFDS has prepared as ArrayRecord are read as they are. Otherwise the official
archive is written in that form first, once. The decoded arrays are cached; as long as
the cache is intact TFDS is not even imported.
"""

import contextlib
import fcntl
import functools
import logging
import pathlib
import warnings
from collections.abc import Iterator

from samrobust.data import official
from samrobust.data.archive import find_archive
from samrobust.data.cache import Arrays
from samrobust.data.folders import default_data_dir
from samrobust.data.official import VERSION, CifarSpec, check_examples
from samrobust.data.prepared import file_formats, find_prepared, read_split
from samrobust.data.splits import DatasetEntry, DatasetUnavailableError

__all__ = ["CIFAR10", "CIFAR100", "load_cifar", "whereabouts"]

logger = logging.getLogger(__name__)


def load_cifar(
    spec: CifarSpec,
    data_dir: pathlib.Path | None,
    manual_dir: pathlib.Path | None,
    cache_dir: pathlib.Path | None,
) -> Arrays:
    """Returns the official splits in the official order, preparing them if need be.

    Args:
      spec: which data set.
      data_dir: the TFDS directory; None for the default.
      manual_dir: where the user put the archive, if anywhere.
      cache_dir: for the decoded arrays; None for the default.

    Returns:
      `x_train` and `x_test`, uint8 `[N, 32, 32, 3]`, and `y_train` and `y_test`, int32
      `[N]`, read-only and if possible memory-mapped. **Guarantees**: the labels are the
      official ones in the official order.

    Raises:
      DatasetUnavailableError: if there are no data, or they cannot be read, or their
        labels are not the official ones.

    Warns:
      UserWarning: if the images are not the official ones.
    """
    data_dir = data_dir or default_data_dir()
    prepared = find_prepared(spec.name, data_dir, VERSION)
    if prepared is None:
        prepared = _prepare(spec, data_dir, manual_dir)
    arrays: Arrays = {}
    other = []
    for split in ("train", "test"):
        found = _load_split(spec, prepared, split, cache_dir)
        arrays[f"x_{split}"], arrays[f"y_{split}"] = found["images"], found["labels"]
        if not spec.official[split].has_images(found["images"]):
            other.append(split)
    if other:
        warnings.warn(
            f"The {' and '.join(other)} images in {prepared} are not those of "
            f"{spec.title}: a number measured with them is none of {spec.title}. "
            f"{_remedy(spec.name)}",
            stacklevel=2,
        )
    return arrays


def whereabouts(spec: CifarSpec) -> str:
    """Says where `load_cifar` would take a data set from; looks, and loads nothing."""
    data_dir = default_data_dir()
    if prepared := find_prepared(spec.name, data_dir, VERSION):
        return f"prepared in {prepared}"
    downloads, archive = data_dir / "downloads", spec.archive
    for folder in (downloads / "manual", downloads):
        if (folder / archive.name).is_file():
            return f"not prepared, to be made of {folder / archive.name}"
    size = f"{archive.num_bytes / 1e6:.0f} MB"
    return f"not there, {size} to be downloaded from {archive.url}"


def _load_split(
    spec: CifarSpec,
    prepared: pathlib.Path,
    split: str,
    cache_dir: pathlib.Path | None,
) -> Arrays:
    """Returns images and labels, after a check of them."""
    try:
        return read_split(
            prepared,
            split,
            cache_dir,
            verify=lambda arrays: check_examples(spec.official[split], arrays),
        )
    except (OSError, ValueError) as error:
        raise DatasetUnavailableError(
            f"Expected the {split} examples of {spec.title} in {prepared}, got: "
            f"{error} {_remedy(spec.name)}"
        ) from error


def _remedy(name: str) -> str:
    """Says how to get usable data without losing any."""
    return (
        f"Set data_dir (or TFDS_DATA_DIR) to a directory with {name}/{VERSION}, as "
        "TFDS prepares it in ArrayRecord format, or to an empty one, to have it made."
    )


def _prepare(
    spec: CifarSpec, data_dir: pathlib.Path, manual_dir: pathlib.Path | None
) -> pathlib.Path:
    """Writes the data set from its archive, and returns its directory."""
    target = data_dir / spec.name / VERSION
    _check_vacant(spec.name, data_dir)
    try:
        with _one_process_at_a_time(data_dir / "downloads" / f"{spec.name}.lock"):
            if (prepared := find_prepared(spec.name, data_dir, VERSION)) is not None:
                return prepared  # another process was faster
            otherwise = f"Or set{_remedy(spec.name).removeprefix('Set')}"
            downloads = data_dir / "downloads"
            archive = find_archive(
                spec.archive, downloads, manual_dir, otherwise=otherwise
            )
            from samrobust.data.cifar_builder import CifarBuilder

            CifarBuilder(spec, archive, data_dir).download_and_prepare()
    except DatasetUnavailableError:
        raise
    except (OSError, RuntimeError) as error:  # the latter is ArrayRecord's: a full disk
        # Without locks another machine may have been faster: then the rename fails.
        if find_prepared(spec.name, data_dir, VERSION) is None:
            raise DatasetUnavailableError(
                f"Expected to write {spec.name} to {data_dir}, got: "
                f"{' '.join(str(error).split())}. {_remedy(spec.name)}"
            ) from error
    return target


def _check_vacant(name: str, data_dir: pathlib.Path) -> None:
    """Refuses to write where something else is; leaves that unchanged."""
    for root in (data_dir.absolute().parent, data_dir.absolute().parent.parent):
        found = find_prepared(name, root, VERSION)
        if found and data_dir.absolute() in (found, found.parent):
            raise DatasetUnavailableError(
                f"Expected the directory that holds {name}/ as data_dir, got "
                f"data_dir={str(data_dir)!r}, which lies within. Set it to {root}."
            )
    target = data_dir / name / VERSION
    if not target.exists():
        return
    if formats := file_formats(target):
        found = f"{target} in the format {', '.join(formats)}"
    elif (target / "dataset_info.json").exists():
        found = f"a damaged {target / 'dataset_info.json'}"
    else:
        found = f"{target} without its dataset_info.json"
    raise DatasetUnavailableError(
        f"Expected ArrayRecord data of {name}, got {found}. It is left as it is. "
        f"{_remedy(name)}"
    )


@contextlib.contextmanager
def _one_process_at_a_time(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock on a file; the system releases it if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            logger.warning("No lock on %s: %s", path, error)
        yield


def _entry(spec: CifarSpec) -> DatasetEntry:
    return DatasetEntry(spec.facts, functools.partial(load_cifar, spec))


CIFAR10, CIFAR100 = map(_entry, (official.CIFAR10, official.CIFAR100))
