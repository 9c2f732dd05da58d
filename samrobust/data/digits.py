"""Handwritten digits, 8x8 gray images that come with the package.

The 1,797 images of the UCI "Optical Recognition of Handwritten Digits" test set, those
of scikit-learn's `load_digits`, split here once and for all into 1,297 training and 500
test images. `digits.npz` holds them as published, pixels 0..16.

Reference: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998,
doi.org/10.24432/C50P49, under CC BY 4.0.
"""

import pathlib

import numpy as np

from samrobust.data.splits import DatasetEntry, DatasetFacts

__all__ = ["DIGITS", "load_digits"]

_FACTS = DatasetFacts(
    num_classes=10,
    image_shape=(8, 8, 1),
    mean=(0.30488547288614753,),
    std=(0.3758450217031884,),
    num_train=1297,
    num_test=500,
)
_FILE = pathlib.Path(__file__).with_suffix(".npz")
_SPLIT_SEED = 0


def load_digits() -> dict[str, np.ndarray]:
    """Returns the two splits of the digits.

    Pixel values 0..16 become round(255 v / 16).

    Returns:
      `x_train` and `x_test`, uint8 `[1297, 8, 8, 1]` and `[500, 8, 8, 1]`, and their
      labels `y_train` and `y_test`, int32. **Guarantees**: the splits are disjoint and
      together hold every image once, in the published order; the share of each class
      in the test split differs from its share in all images by less than 1 image; the
      split never changes.

    >>> load_digits()["x_train"].shape
    (1297, 8, 8, 1)
    """
    with np.load(_FILE) as file:
        pixels, labels = file["pixels"], file["labels"].astype(np.int32)
    images = np.round(pixels.reshape(-1, 8, 8, 1) * 255.0 / 16).astype(np.uint8)
    is_test = np.zeros(len(labels), bool)
    is_test[_stratified_choice(labels, _FACTS.num_test)] = True
    return {
        **{"x_train": images[~is_test], "y_train": labels[~is_test]},
        **{"x_test": images[is_test], "y_test": labels[is_test]},
    }


def _stratified_choice(labels: np.ndarray, size: int) -> np.ndarray:
    """Returns `size` distinct positions in which each class has its share."""
    # The raw stream of a bit generator is fixed forever; Generator's methods are not.
    shuffled = np.random.PCG64(_SPLIT_SEED).random_raw(len(labels))
    by_class = np.lexsort((shuffled, labels))
    evenly_spread = ((2 * np.arange(size) + 1) * len(labels)) // (2 * size)
    return by_class[evenly_spread]


DIGITS = DatasetEntry(_FACTS, lambda **_: load_digits())
