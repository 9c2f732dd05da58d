"""PreActResNet in PyTorch, and its weights to and from Flax's layout.

The network of the paper's PyTorch code, written from the facts about it, without
the rest of samrobust and without JAX: an oracle of the tests, and what `reference.py`
times. Images are [B, C, H, W] in [0, 1]; the normalization of pixels is inside.
Weights in Flax's layout are arrays by their paths, as `params/stem/kernel`.

Out of scope: attacks, training, data.

Reference: He et al., 2016, arXiv 1603.05027; Wei, Zhu and Zhang, 2023, arXiv
2305.05392.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from samrobust.checks import check

__all__ = ["TwinBlock", "TwinResNet", "from_jax", "to_jax"]


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class TwinBlock(nn.Module):
    """A block: batch norm, ReLU, 3x3 convolution, twice, and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _convolution(in_channels, channels, 3, stride)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = _convolution(channels, channels, 3)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = _convolution(in_channels, channels, 1, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, channels, H / stride, W / stride]."""
        activated = torch.relu(self.norm1(inputs))
        # The convolution of the shortcut sees activated inputs, the identity raw ones.
        skip = inputs if self.shortcut is None else self.shortcut(activated)
        hidden = self.conv1(activated)
        hidden = self.conv2(torch.relu(self.norm2(hidden)))
        return hidden + skip


class TwinResNet(nn.Module):
    """A pre-activation ResNet for small images; the defaults are PreActResNet-18.

    Args:
      width: channels of the first stage; stage i has `width * 2**i`.
      blocks: number of blocks of each stage; all stages but the first halve the size.
      num_classes: number of logits.
      in_channels: channels of the images.
      mean: subtracted from the images, a number for all channels or one for each.
      std: what they are divided by, likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        width: int = 64,
        blocks: Sequence[int] = (2, 2, 2, 2),
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ):
        super().__init__()
        for name, value in (("mean", mean), ("std", std)):
            buffer = torch.tensor(value).reshape(1, -1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        self.stem = _convolution(in_channels, width, 3)
        stages, channels = OrderedDict[str, nn.Module](), width
        for i, num_blocks in enumerate(blocks):
            for j in range(num_blocks):
                stride = 2 if i > 0 and j == 0 else 1
                block = TwinBlock(channels, width * 2**i, stride)
                stages[f"stage{i + 1}_block{j + 1}"] = block
                channels = width * 2**i
        self.stages = nn.Sequential(stages)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        hidden = self.stages(self.stem((images - self.mean) / self.std))
        return self.head(torch.relu(self.norm(hidden)).mean(dim=(2, 3)))


# --- weights --------------------------------------------------------------------------

# kind of layer -> (collection, Flax name, PyTorch name)
_NAMES = {
    nn.Conv2d: (("params", "kernel", "weight"),),
    nn.Linear: (("params", "kernel", "weight"), ("params", "bias", "bias")),
    nn.BatchNorm2d: (
        ("params", "scale", "weight"),
        ("params", "bias", "bias"),
        ("batch_stats", "mean", "running_mean"),
        ("batch_stats", "var", "running_var"),
    ),
}
_TO_JAX = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}  # OIHW -> HWIO, [out, in] -> [in, out]
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields Flax's path of each tensor of the model, and the tensor."""
    for name, module in model.named_modules():
        path = name.removeprefix("stages.").replace(".", "/")
        for collection, jax_name, torch_name in _NAMES.get(type(module), ()):
            tensor = getattr(module, torch_name).detach()
            yield f"{collection}/{path}/{jax_name}", tensor


def to_jax(model: nn.Module) -> dict[str, np.ndarray]:
    """Returns the model's weights by Flax's paths, in Flax's layout."""
    return {
        # A copy: training the model must not change the variables it was given from.
        path: np.array(tensor.cpu().numpy().transpose(_TO_JAX[tensor.ndim]))
        for path, tensor in _tensors(model)
    }


def from_jax(model: nn.Module, variables: Mapping[str, Any]) -> None:
    """Loads weights by Flax's paths into the model; each must find its place.

    Raises:
      ValueError: if a path is missing or left over, or a shape differs.
    """
    tensors = dict(_tensors(model))
    check(
        tensors.keys() == variables.keys(),
        "the weights of this network, of its width and blocks",
        missing=sorted(tensors.keys() - variables.keys()),
        left_over=sorted(variables.keys() - tensors.keys()),
    )
    for path, tensor in tensors.items():
        value = np.asarray(variables[path])
        value = value.transpose(_TO_TORCH[value.ndim])
        shape = tuple(tensor.shape)
        check(value.shape == shape, f"shape {shape} at {path}", shape=value.shape)
        tensor.copy_(torch.from_numpy(np.array(value)))
