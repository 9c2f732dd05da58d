"""What an outcome depends on, so that none is taken for another's."""

import hashlib
import re
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from samrobust.attacks import ATTACKS_VERSION
from samrobust.data import Split, fingerprint
from samrobust.provenance import random_bits
from samrobust.types import Array, PyTree

__all__ = ["identify"]

_VERSION = 2  # raised when the same attacks are given other images, keys or networks


def identify(
    model: nn.Module, variables: PyTree, split: Split, key: Array, **settings: Any
) -> dict[str, Any]:
    """All that the outcome of an attack depends on but rounding, in JSON's types.

    Args:
      model: its fields count: another normalisation is another network.
      variables: of the model.
      split: the images.
      key: of the random numbers.
      **settings: of the attacks, in JSON's types.
    """
    return {
        "version": [_VERSION, ATTACKS_VERSION],
        "model": re.sub(r" at 0x[0-9a-f]+", "", repr(model)),
        "network": _checksum(variables),
        "split": fingerprint(split),
        "key": jax.random.key_data(key).tolist(),
        "random": random_bits(),
        **settings,
    }


def _checksum(tree: PyTree) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(jax.device_get(leaf))
        name = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()
