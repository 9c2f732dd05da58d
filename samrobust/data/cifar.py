"""CIFAR-10 and CIFAR-100 through TensorFlow Datasets, without TensorFlow.

Data that TFDS has prepared as ArrayRecord are read as they are. Otherwise the official
archive is written in that form first, once. The decoded arrays are cached; as long as
the cache is intact TFDS is not even imported.
"""

import contextlib
import dataclasses
import fcntl
import logging
import pathlib
import warnings
from collections.abc import Iterator

from samrobust.data.archive import Archive, find_archive
from samrobust.data.cache import Arrays
from samrobust.data.folders import default_data_dir
from samrobust.data.official import (
    CIFAR10_SPLITS,
    CIFAR100_SPLITS,
    OfficialSplit,
    check_examples,
)
from samrobust.data.prepared import file_formats, find_prepared, read_split
from samrobust.data.splits import DatasetFacts, DatasetUnavailableError

__all__ = ["CIFAR10", "CIFAR100", "CifarSpec", "load_cifar"]

VERSION = "3.0.2"  # of TFDS's builders; versions differ in the form of the files only
_SHAPE = (32, 32, 3)

logger = logging.getLogger(__name__)


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
    archive: Archive
    splits: dict[str, tuple[str, ...]]
    labels: tuple[tuple[str, str, int], ...]
    label_bytes: tuple[str, ...]
    official: dict[str, OfficialSplit]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def members(self) -> list[str]:
        """All files of the archive that we need."""
        names = [member for _, member, _ in self.labels]
        return names + [
            member for members in self.splits.values() for member in members
        ]

    @property
    def facts(self) -> DatasetFacts:
        """What is known without the images."""
        train, test = self.official["train"], self.official["test"]
        return DatasetFacts(
            num_classes=train.num_classes,
            image_shape=_SHAPE,
            mean=self.mean,
            std=self.std,
            num_train=train.num_examples,
            num_test=test.num_examples,
        )


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
    official=CIFAR10_SPLITS,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2471, 0.2435, 0.2616),
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
    official=CIFAR100_SPLITS,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


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
    for split in ("train", "test"):
        found = _load_split(spec, prepared, split, cache_dir)
        arrays[f"x_{split}"], arrays[f"y_{split}"] = found["images"], found["labels"]
    other = [
        split
        for split in ("train", "test")
        if not spec.official[split].has_images(arrays[f"x_{split}"])
    ]
    if other:
        warnings.warn(
            f"The {' and '.join(other)} images in {prepared} are not those of "
            f"{spec.title}: a number measured with them is none of {spec.title}. "
            f"{_remedy(spec.name)}",
            stacklevel=2,
        )
    return arrays


def _load_split(
    spec: CifarSpec,
    prepared: pathlib.Path,
    split: str,
    cache_dir: pathlib.Path | None,
) -> Arrays:
    """Returns images and labels, once they are what they have to be."""
    try:
        return read_split(
            prepared,
            split,
            cache_dir,
            verify=lambda arrays: check_examples(spec.official[split], _SHAPE, arrays),
        )
    except (OSError, ValueError) as error:
        raise DatasetUnavailableError(
            f"Expected the {split} examples of {spec.title} in {prepared}, got: "
            f"{error} {_remedy(spec.name)}"
        ) from error


def _remedy(name: str) -> str:
    """Says how to come to data that can be used, and lose none."""
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
            archive = find_archive(spec.archive, data_dir / "downloads", manual_dir)
            from samrobust.data.cifar_builder import CifarBuilder

            CifarBuilder(spec, archive, data_dir).download_and_prepare()
    except DatasetUnavailableError as error:
        message = f"{error} Or set{_remedy(spec.name).removeprefix('Set')}"
        raise DatasetUnavailableError(message) from error
    except (
        OSError,
        RuntimeError,
    ) as error:  # on a full disk ArrayRecord's is no OSError
        # Without locks another machine may have been faster: then the rename fails.
        if find_prepared(spec.name, data_dir, VERSION) is None:
            raise DatasetUnavailableError(
                f"Expected to write {spec.name} to {data_dir}, got: "
                f"{' '.join(str(error).split())}. {_remedy(spec.name)}"
            ) from error
    return target


def _check_vacant(name: str, data_dir: pathlib.Path) -> None:
    """Refuses to write where something else lies already; it is left as it is."""
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
    """Holds a lock on a file; the system lets go of it if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            logger.warning("No lock on %s: %s", path, error)
        yield
