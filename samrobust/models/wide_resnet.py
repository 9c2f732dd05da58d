"""The wide pre-activation ResNet WRN-d-k; the default is WRN-28-10.

36,479,194 parameters for 10 classes; WRN-34-10, the network of TRADES and AWP, is
`depth=34` with 46,160,474. Convolutions and the head as in the authors' Torch code: no
bias in convolutions, N(0, 2 / fan_in) for kernels, a 1x1 shortcut convolution on the
already activated input where a stage begins, dropout before a block's second
convolution, a head with PyTorch's kernel and a bias of zeros.

Our deviations: BatchNorm's scales start at 1 (the authors' at U(0, 1)). TRADES and AWP
scale kernels by fan_out instead, which differs in the stem and where a stage begins;
TRADES also holds a first stage that no image passes.

Reference: Zagoruyko and Komodakis (2016), "Wide Residual Networks", arXiv 1605.07146.
"""

import flax.linen as nn

from samrobust.checks import below_one, check, check_whole
from samrobust.models.layers import ImageClassifier, torch_init
from samrobust.models.preact_resnet import preact_features
from samrobust.types import Array

__all__ = ["WideResNet"]

_he_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class WideResNet(ImageClassifier):
    """A wide pre-activation ResNet; see `ImageClassifier` for the other attributes.

    Attributes:
      depth: layers with weights, 6n + 4, where each of the three stages has n blocks.
      widen: k, the factor of the widths 16, 32 and 64.
      dropout: share of the activations dropped in training before each block's second
        convolution, in [0, 1); 0.3 in the paper where it drops any.
      batch_norm_group: examples over which BatchNorm normalizes in training; 0: the
        whole batch. See `BatchNorm`.
    """

    depth: int = 28
    widen: int = 10
    dropout: float = 0.0
    batch_norm_group: int = 0

    def __post_init__(self) -> None:
        check_whole(10, 6004, depth=self.depth)
        fits = self.depth % 6 == 4
        check(fits, "depth = 6n + 4", "As 16, 22, 28 and 34 are.", depth=self.depth)
        check_whole(1, 1024, widen=self.widen)
        below_one(dropout=self.dropout)
        check_whole(0, batch_norm_group=self.batch_norm_group)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Returns logits [B, K] of images [B, H, W, C] with pixels in [0, 1]."""
        features = preact_features(
            self.normalize(images),
            stem=16,
            widths=[16 * self.widen, 32 * self.widen, 64 * self.widen],
            blocks=[(self.depth - 4) // 6] * 3,
            train=train,
            dtype=self.dtype,
            batch_norm_group=self.batch_norm_group,
            dropout=self.dropout,
            kernel_init=_he_init,
        )
        head = nn.Dense(
            self.num_classes,
            param_dtype=features.dtype,
            kernel_init=torch_init,
            name="head",
        )
        return head(features)
