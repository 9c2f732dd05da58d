"""Names and layouts: our variables as the tensors of the paper's PyTorch code.

There `conv1` is what we call `stem`, `layer2.0.bn1` our `stage2_block1/norm1`, `bn` our
`norm` and `linear` our `head`. Kernels are OIHW there and HWIO here; PyTorch's dense
weights are [out, in]. Values are never changed, so the way there and back is exact.

Tensors of other networks keep the names of their variables, joined by dots, and their
layouts: `params.Dense_0.kernel`.

Out of scope: the normalization of the pixels, which is inside our network and outside
theirs.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn, traverse_util

from samrobust.checks import check
from samrobust.models import PreActResNet
from samrobust.models.torch.wrapping import first_of, listed
from samrobust.system.jaxprs import abstract_key
from samrobust.types import PyTree

__all__ = ["from_tensors", "infer_architecture", "to_tensors"]

Tensors = dict[str, np.ndarray]

_MODULES = {
    "stem": "conv1",
    "norm": "bn",
    "norm1": "bn1",
    "norm2": "bn2",
    "conv1": "conv1",
    "conv2": "conv2",
    "shortcut": "shortcut.0",
    "head": "linear",
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_COUNTER = "num_batches_tracked"  # PyTorch's; without effect at its usual momentum
# HWIO -> OIHW, [in, out] -> [out, in]
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


def to_tensors(variables: PyTree, model: nn.Module) -> Tensors:
    """Returns a network's variables as tensors by name.

    Args:
      variables: `{"params": ..., "batch_stats": ...}`.
      model: whose variables they are; those of a `PreActResNet` get PyTorch's names and
        layouts.

    Returns:
      Contiguous float32 arrays, and of a `PreActResNet` a `num_batches_tracked`, an
      int64 scalar 0, for every BatchNorm: the keys that `load_state_dict(strict=True)`
      expects.
    """
    leaves = traverse_util.flatten_dict(variables)
    if not isinstance(model, PreActResNet):
        return {".".join(path): np.array(leaf) for path, leaf in leaves.items()}
    tensors: Tensors = {}
    for path, leaf in leaves.items():
        name, value = _torch_name(path), np.asarray(leaf)
        tensors[name] = np.array(value.transpose(_TO_TORCH[value.ndim]), order="C")
        if path[-1] == "var":
            counter = name.removesuffix("running_var") + _COUNTER
            tensors[counter] = np.zeros([], np.int64)
    return tensors


def infer_architecture(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Infers the fields of a `PreActResNet` from names and shapes of its tensors.

    Returns:
      `num_classes`, `width` and `blocks`.

    Raises:
      ValueError: if the first or the last layer is missing or of another kind, or there
        is no stage; names it.
    """
    for name, rank in (("conv1.weight", 4), ("linear.weight", 2)):
        check(
            name in tensors and tensors[name].ndim == rank,
            f"a tensor {name} with {rank} axes",
            "Is it a pre-activation ResNet, with the names of the paper's code?",
            **(
                {name: list(tensors[name].shape)}
                if name in tensors
                else {"names": listed(tensors)}
            ),
        )
    found = (re.match(r"layer([0-9]{1,3})\.([0-9]{1,3})\.", n) for n in tensors)
    places = {(int(match[1]), int(match[2])) for match in found if match}
    check(len(places) > 0, "tensors named layer1.0...", names=listed(tensors))
    stages = sorted({stage for stage, _ in places})
    return {
        "num_classes": tensors["linear.weight"].shape[0],
        "width": tensors["conv1.weight"].shape[0],
        "blocks": tuple(sum(i == stage for i, _ in places) for stage in stages),
    }


def from_tensors(
    tensors: Mapping[str, np.ndarray],
    model: nn.Module,
    image_shape: tuple[int, int, int],
) -> PyTree:
    """Returns the variables of a network from its tensors.

    Args:
      tensors: by the names that `to_tensors` gives; counters of batches are ignored.
      model: whose variables these are to be.
      image_shape: (H, W, C).

    Returns:
      `{"params": ..., "batch_stats": ...}`, NumPy arrays, the file's bits.

    Raises:
      ValueError: if a tensor is missing, superfluous, of another shape or not float32,
        names it, with both shapes; if a value is not finite, or a variance negative.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), "float32")
    key = abstract_key()
    like = jax.eval_shape(lambda k, x: model.init(k, x, train=False), key, image)
    leaves: Any = traverse_util.flatten_dict(like)
    as_torch = isinstance(model, PreActResNet)
    paths = {_torch_name(p) if as_torch else ".".join(p): p for p in leaves}
    wanted = {}
    for name, path in paths.items():
        shape = leaves[path].shape
        wanted[name] = _torch_shape(shape) if as_torch else shape
    given = {n: t for n, t in tensors.items() if n.rpartition(".")[2] != _COUNTER}
    _check_fit(wanted, given, type(model).__name__)
    _check_values(given)
    if as_torch:
        given = {n: t.transpose(_FROM_TORCH[t.ndim]) for n, t in given.items()}
    values = {paths[name]: np.array(t, order="C") for name, t in given.items()}
    return traverse_util.unflatten_dict(values)


def _check_fit(
    wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, np.ndarray], kind: str
) -> None:
    problems = [
        f"no {name} {list(shape)}"
        for name, shape in wanted.items()
        if name not in given
    ]
    for name, tensor in given.items():
        has = f"{listed([name])} {list(tensor.shape)}"
        if name not in wanted:
            problems.append(f"a superfluous {has}")
        elif tensor.shape != wanted[name]:
            problems.append(f"{has} instead of {list(wanted[name])}")
        elif tensor.dtype != np.float32:
            problems.append(f"{has} of {tensor.dtype} instead of float32")
    if problems:
        raise ValueError(
            f"Expected the tensors of this {kind}, got {first_of(problems)}. Nothing "
            "was written. Is it another network, or are its classes or channels not "
            "those of the data set?"
        )


def _check_values(tensors: Mapping[str, np.ndarray]) -> None:
    """Refuses a network that has no logits: what it then "predicts" is class 0."""
    problems = []
    for name, tensor in tensors.items():
        wrong = np.count_nonzero(~np.isfinite(tensor))
        if wrong:
            problems.append(f"{name} with {wrong} of {tensor.size} NaN or infinite")
        elif name.endswith((".running_var", ".var")) and tensor.min() < 0:
            problems.append(f"{name} with the variance {tensor.min():g}")
    if problems:
        raise ValueError(
            f"Expected finite weights and variances >= 0, got {listed(problems)}. "
            "Nothing was written. The network diverged, or the file is damaged."
        )


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _TO_TORCH[len(shape)])


def _torch_name(path: tuple[str, ...]) -> str:
    """Turns `("params", "stage2_block1", "conv1", "kernel")` into PyTorch's name."""
    _, *modules, leaf = path
    return ".".join([*map(_torch_module, modules), _LEAVES[leaf]])


def _torch_module(name: str) -> str:
    block = re.fullmatch(r"stage(\d+)_block(\d+)", name)
    return f"layer{block[1]}.{int(block[2]) - 1}" if block else _MODULES[name]
