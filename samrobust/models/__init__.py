"""Classifiers, by their names in configs, and the layers that they are made of."""

from samrobust.models.batch_norm import BatchNorm
from samrobust.models.conv import conv2d
from samrobust.models.preact_resnet import PreActResNet
from samrobust.models.resnet import ResNet
from samrobust.models.vit import ViT
from samrobust.models.wide_resnet import WideResNet

__all__ = [
    "MODELS",
    "BatchNorm",
    "PreActResNet",
    "ResNet",
    "ViT",
    "WideResNet",
    "conv2d",
]

# By their names in configs. A constructor takes num_classes, mean, std and dtype, where
# it has BatchNorm also batch_norm_group; its other parameters are the config's fields.
MODELS = {
    "preact_resnet": "samrobust.models.preact_resnet:PreActResNet",
    "wide_resnet": "samrobust.models.wide_resnet:WideResNet",
    "resnet18": "samrobust.models.resnet:ResNet",
    "vit": "samrobust.models.vit:ViT",
}
