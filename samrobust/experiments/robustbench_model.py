"""A pre-activation ResNet that takes pixels in [0, 1]; needs PyTorch alone.

    network = load_model("model.pt")
    logits = network(images)  # [B, C, H, W] in [0, 1] to [B, K]

Reference: He et al. (2016), "Identity Mappings in Deep Residual Networks",
arXiv 1603.05027.
"""

import re

import torch
from torch import nn

__all__ = ["NormalizedPreActResNet", "PreActNetwork", "load_model"]


class TorchBlock(nn.Module):
    """Block of batch norm, ReLU, 3x3 convolution, twice, and a shortcut."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection)

    def forward(self, inputs):
        """Maps [B, C, H, W] to [B, channels, H / stride, W / stride]."""
        activated = torch.relu(self.bn1(inputs))
        # The projection sees activated inputs, the identity raw ones.
        skip = inputs if self.shortcut is None else self.shortcut(activated)
        hidden = self.conv2(torch.relu(self.bn2(self.conv1(activated))))
        return hidden + skip


class PreActNetwork(nn.Module):
    """Network on normalized images; every stage but the first halves the size."""

    def __init__(self, num_classes, width, blocks, in_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.num_stages, channels = len(blocks), width
        for i, count in enumerate(blocks):
            stage = []
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(TorchBlock(channels, width * 2**i, stride))
                channels = width * 2**i
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, inputs):
        """Maps normalized images [B, C, H, W] to logits [B, num_classes]."""
        hidden = self.conv1(inputs)
        for i in range(self.num_stages):
            hidden = getattr(self, f"layer{i + 1}")(hidden)
        return self.linear(torch.relu(self.bn(hidden)).mean(dim=(2, 3)))


class NormalizedPreActResNet(nn.Module):
    """Network on pixels in [0, 1]."""

    def __init__(self, num_classes=10, width=64, blocks=(2, 2, 2, 2), in_channels=3):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, in_channels, 1, 1))
        self.register_buffer("std", torch.ones(1, in_channels, 1, 1))
        self.model = PreActNetwork(num_classes, width, blocks, in_channels)

    def forward(self, images):
        """Maps images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        return self.model((images - self.mean) / self.std)


def load_model(path):
    """Returns the network of a state dict, which tells its sizes, for evaluation."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    found = (re.match(r"model\.layer(\d+)\.(\d+)\.", name) for name in state)
    places = {(int(match[1]), int(match[2])) for match in found if match}
    stages = sorted({stage for stage, _ in places})
    width, in_channels = state["model.conv1.weight"].shape[:2]
    network = NormalizedPreActResNet(
        num_classes=len(state["model.linear.bias"]),
        width=width,
        blocks=[sum(place[0] == stage for place in places) for stage in stages],
        in_channels=in_channels,
    )
    network.load_state_dict(state, strict=True)
    return network.eval()
