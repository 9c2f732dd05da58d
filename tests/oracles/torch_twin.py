"""A PyTorch twin of the network, the attacks and the training steps, as an oracle.

Written from the facts about the paper's PyTorch code (weizeming/SAM_AT), without
samrobust: images are [B, C, H, W] in [0, 1], radii in pixel units; the normalization of
pixels is inside the network, whose state dict has the names of that code. Attacks start
where they are told to, so that no random numbers have to agree.

Out of scope: data, schedules, speed.

Reference: Wei, Zhu and Zhang, 2023, arXiv 2305.05392.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own custom
from flax import traverse_util
from torch import Tensor, nn

__all__ = [
    "TwinResNet",
    "from_jax",
    "frozen_statistics",
    "pgd_l2",
    "pgd_linf",
    "sgd",
    "to_jax",
    "train_step_at",
    "train_step_sam",
    "train_step_sam_at",
    "train_step_st",
]

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]

SAM_FLOOR = 1e-12  # davda54/sam, and with it the reference, adds it to the norm


# --- the network ---------------------------------------------------------------------


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class TwinBlock(nn.Module):
    """A block: batch norm, ReLU, 3x3 convolution, twice, and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _convolution(in_channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = _convolution(channels, channels, 3)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            projection = _convolution(in_channels, channels, 1, stride)
            self.shortcut = nn.Sequential(projection)

    def forward(self, inputs: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, channels, H / stride, W / stride]."""
        activated = torch.relu(self.bn1(inputs))
        # The convolution of the shortcut sees activated inputs, the identity raw ones.
        skip = inputs if self.shortcut is None else self.shortcut(activated)
        hidden = self.conv1(activated)
        hidden = self.conv2(torch.relu(self.bn2(hidden)))
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
        self.conv1 = _convolution(in_channels, width, 3)
        self.num_stages, channels = len(blocks), width
        for i, num_blocks in enumerate(blocks):
            stage = []
            for j in range(num_blocks):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(TwinBlock(channels, width * 2**i, stride))
                channels = width * 2**i
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        hidden = self.conv1((images - self.mean) / self.std)
        for i in range(self.num_stages):
            hidden = getattr(self, f"layer{i + 1}")(hidden)
        return self.linear(torch.relu(self.bn(hidden)).mean(dim=(2, 3)))


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


def _path(name: str) -> str:
    """Returns Flax's path of a layer: `stage2_block1/norm1` of `layer2.0.bn1`."""
    if match := re.match(r"layer(\d+)\.(\d+)\.(\w+)", name):
        stage, block, layer = match.groups()
        return f"stage{stage}_block{int(block) + 1}/{layer.replace('bn', 'norm')}"
    return {"conv1": "stem", "bn": "norm", "linear": "head"}[name]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields Flax's path of each tensor of the model, and the tensor."""
    for name, module in model.named_modules():
        for collection, jax_name, torch_name in _NAMES.get(type(module), ()):
            tensor = getattr(module, torch_name).detach()
            yield f"{collection}/{_path(name)}/{jax_name}", tensor


def to_jax(model: nn.Module) -> dict[str, Any]:
    """Returns the model's weights as Flax's `{"params": ..., "batch_stats": ...}`."""
    leaves = {
        # A copy: training the model must not change the variables it was given from.
        path: np.array(tensor.cpu().numpy().transpose(_TO_JAX[tensor.ndim]))
        for path, tensor in _tensors(model)
    }
    return traverse_util.unflatten_dict(leaves, sep="/")


def from_jax(model: nn.Module, variables: Mapping[str, Any]) -> None:
    """Loads Flax's variables into the model, in place; each must find its place."""
    leaves = traverse_util.flatten_dict(variables, sep="/")
    tensors = dict(_tensors(model))
    assert tensors.keys() == leaves.keys()
    for path, tensor in tensors.items():
        value = np.asarray(leaves[path])
        value = value.transpose(_TO_TORCH[value.ndim])
        assert value.shape == tuple(tensor.shape)
        tensor.copy_(torch.from_numpy(np.array(value)))


# --- running statistics and the training mode ----------------------------------------


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Puts the running statistics back to what they were at entry."""
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(saved[name])


@contextlib.contextmanager
def _mode(model: nn.Module, *, train: bool) -> Iterator[None]:
    """Sets train or eval mode for the duration of the block."""
    before = model.training
    model.train(train)
    try:
        yield
    finally:
        model.train(before)


# --- attacks --------------------------------------------------------------------------


def _per_example(values: Tensor, images: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], with as many dimensions as `images`."""
    return values.reshape(-1, *[1] * (images.ndim - 1))


def _input_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the summed cross entropy with respect to the images."""
    images = images.detach().requires_grad_()
    loss = F.cross_entropy(model(images), labels, reduction="sum")
    return torch.autograd.grad(loss, images)[0]


def _ascend(
    model: nn.Module,
    labels: Tensor,
    start: Tensor,
    step: Callable[[Tensor, Tensor], Tensor],
    num_steps: int,
    *,
    train: bool,
    update_statistics: bool,
) -> Tensor:
    """Applies `step(iterate, gradient)` `num_steps` times."""
    keep = contextlib.nullcontext() if update_statistics else frozen_statistics(model)
    iterate = start
    with _mode(model, train=train), keep:
        for _ in range(num_steps):
            gradient = _input_gradient(model, iterate, labels)
            iterate = step(iterate, gradient)
    return iterate.detach()


def pgd_linf(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    step_size: float,
    num_steps: int,
    start: Tensor | None = None,
    *,
    train: bool = False,
    update_statistics: bool = False,
) -> Tensor:
    """Projected sign ascent on the cross entropy, in the linf ball and the box.

    Args:
      model: images [B, C, H, W] in [0, 1] -> logits.
      images: center of the ball, [B, C, H, W].
      labels: [B].
      eps: radius in pixel units.
      step_size: length of a step in pixel units.
      num_steps: number of gradient steps.
      start: first iterate, the images themselves if not given.
      train: whether batch norm uses the batch's statistics, rather than running ones.
      update_statistics: whether the attack's forward passes leave their mark on the
        running statistics when `train`, as they do in the reference.

    Returns:
      The final iterate, [B, C, H, W].
    """

    def step(iterate: Tensor, gradient: Tensor) -> Tensor:
        delta = iterate + step_size * gradient.sign() - images
        return (images + delta.clamp(-eps, eps)).clamp(0.0, 1.0)

    start = images if start is None else start
    return _ascend(
        model,
        labels,
        start,
        step,
        num_steps,
        train=train,
        update_statistics=update_statistics,
    )


def pgd_l2(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    step_size: float,
    num_steps: int,
    start: Tensor | None = None,
    *,
    floor: float = 0.0,
    train: bool = False,
    update_statistics: bool = False,
) -> Tensor:
    """Projected normalized ascent on the cross entropy, in the l2 ball and the box.

    Args:
      model: see `pgd_linf`, as for all arguments that are not listed here.
      images: center of the ball, [B, C, H, W].
      labels: [B].
      eps: radius in pixel units.
      step_size: length of a step in pixel units.
      num_steps: number of gradient steps.
      start: first iterate.
      floor: added to the norm of the summed loss's gradient before dividing by it; a
        zero gradient makes no step whatever the floor.
      train: whether batch norm uses the batch's statistics.
      update_statistics: whether the attack updates the running statistics.

    Returns:
      The final iterate, [B, C, H, W].
    """

    def step(iterate: Tensor, gradient: Tensor) -> Tensor:
        norm = gradient.flatten(1).norm(dim=1) + floor
        scale = torch.where(norm > 0, 1.0 / norm, 0.0)
        delta = iterate + step_size * gradient * _per_example(scale, images) - images
        length = delta.flatten(1).norm(dim=1)
        shrink = torch.where(length > eps, eps / length, 1.0)
        return (images + delta * _per_example(shrink, images)).clamp(0.0, 1.0)

    start = images if start is None else start
    return _ascend(
        model,
        labels,
        start,
        step,
        num_steps,
        train=train,
        update_statistics=update_statistics,
    )


# --- training -------------------------------------------------------------------------


def sgd(
    params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """SGD with weight decay on all parameters, batch norm and biases included."""
    return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)


def _gradients(
    model: nn.Module, images: Tensor, labels: Tensor, *, update_statistics: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """Mean cross entropy in train mode and its gradient in the parameters."""
    keep = contextlib.nullcontext() if update_statistics else frozen_statistics(model)
    with _mode(model, train=True), keep:
        loss = F.cross_entropy(model(images), labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), list(gradients)


def _descend(
    model: nn.Module, optimizer: torch.optim.Optimizer, gradients: list[Tensor]
) -> None:
    """One step of the optimizer along given gradients."""
    for param, gradient in zip(model.parameters(), gradients, strict=True):
        param.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def train_step_st(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> float:
    """One step of standard training; returns the loss before it."""
    loss, gradients = _gradients(model, images, labels)
    _descend(model, optimizer, gradients)
    return loss.item()


def train_step_sam(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    rho: float,
    *,
    batch_stats: str = "both",
) -> float:
    """One SAM step: the gradient at w + rho g / (||g|| + 1e-12) moves w.

    The norm is taken over all parameters at once; weight decay and momentum act at w.

    Args:
      model: the network, updated in place.
      optimizer: updated in place.
      images: [B, C, H, W].
      labels: [B].
      rho: length of the ascent step.
      batch_stats: the pass that updates the running statistics, "first", "second" or
        "both" (the reference).

    Returns:
      The loss of the first pass, at w.
    """
    loss, gradients = _gradients(
        model, images, labels, update_statistics=batch_stats in ("first", "both")
    )
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    saved = [param.detach().clone() for param in model.parameters()]
    with torch.no_grad():
        for param, gradient in zip(model.parameters(), gradients, strict=True):
            param.add_(rho * gradient / (norm + SAM_FLOOR))
    _, gradients = _gradients(
        model, images, labels, update_statistics=batch_stats in ("second", "both")
    )
    with torch.no_grad():
        for param, value in zip(model.parameters(), saved, strict=True):
            param.copy_(value)
    _descend(model, optimizer, gradients)
    return loss.item()


def train_step_at(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
) -> float:
    """One step of adversarial training on `attack(model, images, labels)`."""
    return train_step_st(model, optimizer, attack(model, images, labels), labels)


def train_step_sam_at(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    rho: float,
    attack: Attack,
    *,
    batch_stats: str = "both",
) -> float:
    """A SAM step on adversarial images that are crafted once, at w.

    The reference's ascent direction contains the attack's weight gradients, which it
    does not zero: a bug, and not repeated here.
    """
    adversarial = attack(model, images, labels)
    return train_step_sam(
        model, optimizer, adversarial, labels, rho, batch_stats=batch_stats
    )
