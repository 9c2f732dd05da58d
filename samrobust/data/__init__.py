"""Image datasets as uint8 arrays, and the random access and augmentation of them.

`load_dataset` gives NumPy arrays in a fixed order; `take_batch`, `epoch_permutation`,
`random_crop_and_flip` and `augmented` are pure functions for the inside of a compiled
step. Images are `[N, H, W, C]`: uint8 at rest, float32 in [0, 1] in a batch.
"""

from samrobust.data.batches import (
    augmented,
    check_padding,
    epoch_permutation,
    random_crop_and_flip,
    take_batch,
)
from samrobust.data.datasets import DATASETS, dataset_facts, load_dataset
from samrobust.data.splits import (
    Dataset,
    DatasetEntry,
    DatasetFacts,
    DatasetUnavailableError,
    Split,
    check_labels,
    fingerprint,
    from_arrays,
)

__all__ = [
    "DATASETS",
    "Dataset",
    "DatasetEntry",
    "DatasetFacts",
    "DatasetUnavailableError",
    "Split",
    "augmented",
    "check_labels",
    "check_padding",
    "dataset_facts",
    "epoch_permutation",
    "fingerprint",
    "from_arrays",
    "load_dataset",
    "random_crop_and_flip",
    "take_batch",
]
