"""Images to measure on: the size, mean and contrast of a data set, made from a seed.

Times must not hang on a download, and a network's speed does not hang on what the
images show. They are smooth like photographs, never constant: zeros would take short
cuts that real pixels do not.
"""

import numpy as np

from samrobust.data import Dataset, Split, dataset_facts
from samrobust.data.folders import PathLike

__all__ = ["make_dataset"]

_DIFFERENT = 4096  # images; beyond these they come again


def make_dataset(
    name: str, num_train: int, num_test: int, *, data_dir: PathLike | None = None
) -> Dataset:
    """Returns a data set like `name` in all but its pictures, the same at every call.

    Args:
      name: of a data set of which `dataset_facts` knows.
      num_train: training images.
      num_test: test images.
      data_dir: where data sets lie that TFDS prepared; None: in its own directory.
    """
    num_classes, shape, mean, std, *_ = dataset_facts(name, data_dir=data_dir)
    rng = np.random.default_rng(0)

    def split(size: int) -> Split:
        height, width, channels = shape
        number = min(size, _DIFFERENT)
        coarse = rng.standard_normal((number, height // 4, width // 4, channels))
        smooth = coarse.repeat(4, axis=1).repeat(4, axis=2)
        pixels = 0.8 * smooth + 0.6 * rng.standard_normal((number, *shape))
        images = np.clip(np.array(mean) + np.array(std) * pixels, 0, 1)
        labels = rng.integers(0, num_classes, number).astype(np.int32)
        pixels = np.round(255 * images).astype(np.uint8)
        return Split(np.resize(pixels, (size, *shape)), np.resize(labels, size))

    return Dataset(
        name, num_classes, mean, std, split(num_train), split(0), split(num_test)
    )
