"""CIFAR-10 and CIFAR-100 as TFDS builders that need no TensorFlow.

They leave on disk what TFDS's own builders of these names and this version would leave
as ArrayRecord, so that `tfds.data_source` reads it. Importing this module imports TFDS.
"""

import io
import pathlib
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from samrobust.data.official import IMAGE_SHAPE, VERSION, CifarSpec

__all__ = ["CifarBuilder"]

_CITATION = """\
@TECHREPORT{Krizhevsky09learningmultiple,
    author = {Alex Krizhevsky},
    title = {Learning multiple layers of features from tiny images},
    institution = {University of Toronto},
    year = {2009}
}
"""


class _Info(tfds.core.DatasetInfo):
    """Description that comes from the archive alone."""

    def initialize_from_bucket(self) -> None:
        """Does nothing, where TFDS leaves an empty folder among the temporary files."""


class CifarBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder that writes the official archive in ArrayRecord format."""

    VERSION = tfds.core.Version(VERSION)
    pkg_dir_path = None  # there is no folder with metadata of the data set

    def __init__(self, spec: CifarSpec, archive: pathlib.Path, data_dir: pathlib.Path):
        """Configures the builder.

        Args:
          spec: which of the two data sets.
          archive: the verified archive.
          data_dir: the TFDS directory; the data go to `<data_dir>/<name>/3.0.2`.
        """
        self.name = spec.name  # pyright: ignore[reportAttributeAccessIssue]
        self._spec = spec
        self._archive = archive
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        """Describes the data set with the features of TFDS's own builder."""
        features: dict[str, Any] = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=IMAGE_SHAPE),
        }
        for key, _, num_classes in self._spec.labels:
            features[key] = tfds.features.ClassLabel(num_classes=num_classes)
        return _Info(
            builder=self,
            description=f"{self._spec.title}: 60,000 color images of 32x32 pixels.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
        """Reads the archive, takes the class names from it, and makes both splits."""
        del dl_manager  # the archive is here already
        files = _read_members(self._archive)
        features = cast("tfds.features.FeaturesDict", self.info.features)
        for key, member, _ in self._spec.labels:
            names = files[member].decode().split()
            cast("tfds.features.ClassLabel", features[key]).names = names
        return {
            split: self._generate_examples(split, [files[member] for member in members])
            for split, members in self._spec.splits.items()
        }

    def _generate_examples(
        self, split: str, contents: Sequence[bytes]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the records: label bytes in the archive's order, then the pixels."""
        keys = self._spec.label_bytes
        length = len(keys) + int(np.prod(IMAGE_SHAPE))
        records = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, length)
        for index, record in enumerate(records):
            channels_first = record[len(keys) :].reshape(3, 32, 32)
            example = {
                "id": f"{split}_{index:05d}",
                "image": _encode_png(channels_first.transpose(1, 2, 0)),
            }
            labels = zip(keys, record[: len(keys)].tolist(), strict=True)
            yield index, example | dict(labels)


def _encode_png(image: np.ndarray) -> io.BytesIO:
    """Returns a lossless PNG file in memory, which TFDS stores as it is."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    file.seek(0)
    return file


def _read_members(path: pathlib.Path) -> dict[str, bytes]:
    """Returns the contents of the files of a .tar.gz by name, in one pass over it."""
    with tarfile.open(path, "r|gz") as tar:
        files = ((member.name, tar.extractfile(member)) for member in tar)
        return {name: file.read() for name, file in files if file is not None}
