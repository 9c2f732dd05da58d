"""A data set as far as a network must know it, which takes no image to be read."""

import numpy as np

from samrobust.data import Dataset, Split, dataset_facts
from samrobust.types import Config

__all__ = ["NUM_TEST", "without_images"]

_NUM_TRAIN = {"cifar10": 50_000, "cifar100": 50_000, "digits": 1297}
NUM_TEST = {"cifar10": 10_000, "cifar100": 10_000, "digits": 500}


def without_images(config: Config) -> Dataset:
    """Returns the data set of `config.data` with black training images and no other.

    **Guarantees**: classes, shape, mean, standard deviation and the number of training
    images are the data set's; they take no memory.
    """
    data = config.data
    facts = dataset_facts(data.name)
    size = data.train_size or max(_NUM_TRAIN[data.name] - data.validation_size, 1)

    def black(count: int) -> Split:
        images = np.broadcast_to(np.uint8(0), (count, *facts.image_shape))
        return Split(images, np.broadcast_to(np.int32(0), (count,)))

    return Dataset(
        name=data.name,
        num_classes=facts.num_classes,
        mean=facts.mean,
        std=facts.std,
        train=black(size),
        validation=black(0),
        test=black(0),
    )
