"""Images to measure on: the size, mean and contrast of a data set, made from a seed.

Times must not hang on a download, and a network's speed does not hang on what the
images show. They are smooth like photographs, never constant: zeros would take short
cuts that real pixels do not.
"""

import numpy as np

from samrobust.data import Dataset, Split

__all__ = ["NUM_EXAMPLES", "image_shape", "make_dataset"]

# Official training and test images; of digits, those that samrobust.data makes.
NUM_EXAMPLES = {
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "digits": (1_297, 500),
}

# (classes, shape, mean and standard deviation of the pixels) of the official images.
_KINDS = {
    "cifar10": (10, (32, 32, 3), (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
    "cifar100": (100, (32, 32, 3), (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "digits": (10, (8, 8, 1), (0.305,), (0.376,)),
}


def image_shape(name: str) -> tuple[tuple[int, int, int], int]:
    """Height, width and channels of a data set's images, and its number of classes."""
    num_classes, shape, _, _ = _KINDS[name]
    return shape, num_classes


def make_dataset(name: str, num_train: int, num_test: int) -> Dataset:
    """A data set like `name` in everything but its pictures, the same at every call.

    Args:
      name: one of `samrobust.data.DATASETS`.
      num_train: training images.
      num_test: test images.
    """
    num_classes, shape, mean, std = _KINDS[name]
    rng = np.random.default_rng(0)

    def split(number: int) -> Split:
        height, width, channels = shape
        coarse = rng.standard_normal((number, height // 4, width // 4, channels))
        smooth = coarse.repeat(4, axis=1).repeat(4, axis=2)
        pixels = 0.8 * smooth + 0.6 * rng.standard_normal((number, *shape))
        images = np.clip(np.array(mean) + np.array(std) * pixels, 0, 1)
        labels = rng.integers(0, num_classes, number).astype(np.int32)
        return Split(np.round(255 * images).astype(np.uint8), labels)

    return Dataset(
        name, num_classes, mean, std, split(num_train), split(0), split(num_test)
    )
