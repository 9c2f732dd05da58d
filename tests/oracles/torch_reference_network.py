"""The reference repository's PreActResNet in PyTorch, by its names, for the tests.

Written from the facts about weizeming/SAM_AT: images are normalized before they come
in, a final `bn` precedes the pooling, and the shortcut is a sequence of one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["ReferenceNetwork"]


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        if stride != 1 or in_channels != channels:
            project = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(inputs))
        skip = self.shortcut(hidden) if hasattr(self, "shortcut") else inputs
        hidden = torch.relu(self.bn2(self.conv1(hidden)))
        return self.conv2(hidden) + skip


class ReferenceNetwork(nn.Module):
    def __init__(
        self,
        width: int = 64,
        blocks: Sequence[int] = (2, 2, 2, 2),
        num_classes: int = 10,
        in_channels: int = 3,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.num_stages, channels = len(blocks), width
        for i, count in enumerate(blocks):
            stage = []
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(_Block(channels, width * 2**i, stride))
                channels = width * 2**i
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv1(images)
        for i in range(self.num_stages):
            hidden = getattr(self, f"layer{i + 1}")(hidden)
        return self.linear(torch.relu(self.bn(hidden)).mean(dim=(2, 3)))
