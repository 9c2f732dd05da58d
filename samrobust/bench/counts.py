"""What a training step costs on paper: multiplications, and bytes through memory.

Counted from the network's shape, not from a compiled program: XLA's own analysis counts
the body of a loop once, and an attack is a loop. Only convolutions and the last matrix
product count as arithmetic, a multiply-add as two operations.

Conventions: per image, unless said otherwise; sizes in elements or operations.
"""

import dataclasses
import math
from collections.abc import Sequence

from samrobust.checks import check

__all__ = ["Counts", "Work", "count"]


@dataclasses.dataclass(frozen=True)
class Work:
    """What a training step does, as far as its cost goes.

    Attributes:
      attack_steps: gradient steps of the attack; 0: none.
      passes: forward and backward passes over the weights: 1, with SAM 2.
      attack_weight_gradients: the attack computes gradients of the weights too, as the
        paper's code does, and throws them away.
    """

    attack_steps: int = 0
    passes: int = 1
    attack_weight_gradients: bool = False


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of one network.

    Attributes:
      macs: multiply-adds of a forward pass.
      stem_macs: those of the first convolution, whose input needs no gradient in
        training.
      forward_traffic: elements read and written in a forward pass, if every operation
        reads its inputs from memory and writes its outputs there, with ReLU as part of
        the normalisation before it, whose batch statistics take a pass of their own.
      backward_traffic: likewise, for gradients of weights and inputs.
      image_backward_traffic: likewise, without the gradients of the weights.
    """

    macs: int
    stem_macs: int
    forward_traffic: int
    backward_traffic: int
    image_backward_traffic: int

    def flops(self, work: Work) -> int:
        """Operations of a training step.

        >>> counts = count()
        >>> round(counts.flops(Work()) / 1e9, 3)
        3.329
        >>> round(counts.flops(Work(attack_steps=10)) / counts.flops(Work()), 2)
        7.67
        """
        training = 6 * self.macs - 2 * self.stem_macs
        attack_step = (6 if work.attack_weight_gradients else 4) * self.macs
        return work.passes * training + work.attack_steps * attack_step

    def traffic(self, work: Work) -> int:
        """Elements through memory in a training step."""
        backward = self.image_backward_traffic
        if work.attack_weight_gradients:
            backward = self.backward_traffic
        return work.passes * (
            self.forward_traffic + self.backward_traffic
        ) + work.attack_steps * (self.forward_traffic + backward)


def count(
    width: int = 64,
    blocks: Sequence[int] = (2, 2, 2, 2),
    image_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
) -> Counts:
    """Counts of a `samrobust.models.PreActResNet`; see there for the arguments.

    >>> count().macs  # PreActResNet-18 on CIFAR-10
    555422720
    """
    check(len(blocks) > 0, "at least one stage", blocks=tuple(blocks))
    tally = _Tally(image_shape)
    channels = image_shape[-1]
    tally.convolution(channels, width, window=3, stride=1)
    stem_macs, channels = tally.macs, width
    for stage, number in enumerate(blocks):
        for block in range(number):
            stride = 2 if stage > 0 and block == 0 else 1
            features = width * 2**stage
            tally.norm(channels)
            if stride != 1 or channels != features:
                tally.convolution(
                    channels, features, window=1, stride=stride, keep=True
                )
            tally.convolution(channels, features, window=3, stride=stride)
            tally.norm(features)
            tally.convolution(features, features, window=3, stride=1)
            tally.addition(features)
            channels = features
    tally.norm(channels)
    tally.macs += channels * num_classes
    return Counts(
        tally.macs, stem_macs, tally.forward, tally.backward, tally.image_backward
    )


class _Tally:
    """Sums, at the resolution reached so far."""

    def __init__(self, image_shape: tuple[int, int, int]):
        self._height, self._width, _ = image_shape
        self.macs = self.forward = self.backward = self.image_backward = 0

    @property
    def _pixels(self) -> int:
        return self._height * self._width

    def convolution(
        self, inputs: int, outputs: int, *, window: int, stride: int, keep: bool = False
    ) -> None:
        """A convolution; `keep` leaves the resolution to the one beside it."""
        before, size = self._pixels * inputs, (self._height, self._width)
        self._height = math.ceil(self._height / stride)
        self._width = math.ceil(self._width / stride)
        after = self._pixels * outputs
        self.macs += self._pixels * window**2 * inputs * outputs
        self.forward += before + after
        self.image_backward += before + after
        self.backward += 2 * (before + after)
        if keep:
            self._height, self._width = size

    def norm(self, channels: int) -> None:
        """Batch normalisation and ReLU: statistics, then the result; and back."""
        size = self._pixels * channels
        self.forward += 3 * size
        self.backward += 5 * size
        self.image_backward += 5 * size

    def addition(self, channels: int) -> None:
        """The end of a residual block, and the sum of two gradients at its start."""
        size = self._pixels * channels
        self.forward += 3 * size
        self.backward += 3 * size
        self.image_backward += 3 * size
