"""The file of adversarial images, next to the file of fates.

`NAME-examples.npy`, float32 [N, ...]: the adversarial image of each example that the
attack broke, the natural image of all others. It is written in place, so the file of
fates holds a checksum of each broken image: images that a kill left half written are
made again, and later damage is noticed.
"""

import pathlib
import zlib

import numpy as np

from samrobust.system.storage import of_file
from samrobust.types import Array

__all__ = ["ExamplesFile"]


class ExamplesFile:
    """Adversarial images of a split, one per example.

    Args:
      path: of the file.
      images: the split's, uint8 [N, ...].
    """

    def __init__(self, path: pathlib.Path, images: np.ndarray):
        self.path, self._images = path, images
        self._array: np.ndarray | None = None
        self.sums = np.zeros(len(images), np.uint32)

    def create(self) -> None:
        """Writes the natural images."""
        shape = self._images.shape
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        with of_file(self.path), self.path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for image in self._images:
                file.write(_unit(image).tobytes())
        self._array = np.lib.format.open_memmap(self.path, mode="r+")

    def reopen(self, broken: np.ndarray, sums: np.ndarray) -> str:
        """Opens the existing file, unless it differs from what the fates say.

        Args:
          broken: bool [N], which images the fates say are broken.
          sums: uint32 [N], their checksums.

        Returns:
          The problem with the file; empty if there is none.
        """
        try:
            # Not "r+" before its size is known: that would fill it up with zeros.
            stored = np.lib.format.open_memmap(self.path, mode="r")
        except FileNotFoundError:
            return "is missing"
        except (ValueError, EOFError) as error:
            return f"cannot be read ({error})"
        whole = stored.offset + stored.nbytes == self.path.stat().st_size
        if (
            stored.shape != self._images.shape
            or stored.dtype != np.float32
            or not whole
        ):
            return "holds other arrays"
        found = [_checksum(stored[index]) for index in np.flatnonzero(broken)]
        if sums.shape != broken.shape or found != sums[broken].tolist():
            return "holds other images than those that broke the network"
        self.sums = sums.copy()
        self._array = np.lib.format.open_memmap(self.path, mode="r+")
        for index in np.flatnonzero(~broken):
            original = _unit(self._images[index])
            if not np.array_equal(self._array[index], original):
                self._array[index] = original
        return ""

    def put(self, indices: np.ndarray, images: np.ndarray | Array) -> None:
        """Stores broken images."""
        assert self._array is not None
        for index, image in zip(indices, np.asarray(images, np.float32), strict=True):
            self._array[index] = image
            self.sums[index] = _checksum(image)

    def flush(self) -> None:
        """Flushes stored images to the disk."""
        if isinstance(self._array, np.memmap):
            self._array.flush()


def _unit(image: np.ndarray) -> np.ndarray:
    """Returns pixels in [0, 1], as `take_batch` makes them."""
    return image.astype(np.float32) / np.float32(255)


def _checksum(image: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(image).tobytes())
