"""A data set as far as a network must know it, which takes no image to be read."""

import numpy as np

from samrobust.data import Dataset, DatasetFacts, Split, dataset_facts
from samrobust.types import Config

__all__ = ["facts_of", "without_images"]


def facts_of(config: Config) -> DatasetFacts:
    """Returns what is known of the data set of `config.data`."""
    return dataset_facts(config.data.name, data_dir=config.data.data_dir)


def without_images(config: Config) -> Dataset:
    """Returns the data set of `config.data` with black training images and no other.

    **Guarantees**: classes, shape, mean, standard deviation and the number of training
    images are the data set's; they take no memory.
    """
    data, facts = config.data, facts_of(config)
    size = data.train_size or max(facts.num_train - data.validation_size, 1)

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
