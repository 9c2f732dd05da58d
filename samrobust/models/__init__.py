"""Classifiers: pre-activation ResNets and the layers they are made of."""

from samrobust.models.conv import conv2d
from samrobust.models.preact_resnet import BatchNorm, PreActResNet

__all__ = ["MODELS", "BatchNorm", "PreActResNet", "conv2d"]

MODELS = {"preact_resnet": PreActResNet}
