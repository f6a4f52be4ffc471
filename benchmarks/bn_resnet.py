"""The BatchNorm twin of the authors' NF-ResNet: same stem, widths, depths and shortcuts, BatchNorm before each ReLU."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class PreActivationBottleneck(nn.Module):
    """BatchNorm, ReLU, convolution, three times; the projection shortcut starts from the pre-activated input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module | None) -> None:
        super().__init__()
        mid_channels = out_channels // 4
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(mid_channels)
        self.conv2 = nn.Conv2d(mid_channels, mid_channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(mid_channels)
        self.conv3 = nn.Conv2d(mid_channels, out_channels, 1, bias=False)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual branch plus shortcut."""
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv1(activated)
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        out = self.conv3(F.relu(self.bn3(out), inplace=True))
        return out + shortcut


def projection(in_channels: int, out_channels: int, stride: int, kind: str) -> nn.Module:
    """The first shortcut of a stage: a strided 1x1 convolution, or 2x2 average pooling and a 1x1 convolution."""
    if kind == "avg_pool" and stride > 1:
        pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
        return nn.Sequential(pool, nn.Conv2d(in_channels, out_channels, 1, bias=False))
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class BNResNet(nn.Module):
    """Pre-activation ResNet with the constructor arguments of ``nfnets_kernels.models.NFResNet``."""

    def __init__(
        self,
        depth: Sequence[int] = (3, 4, 6, 3),
        width: int = 4,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        shortcut: str = "conv",
    ) -> None:
        super().__init__()
        channels = 16 * width
        self.stem = nn.Conv2d(in_chans, channels, 7, stride=2, padding=3, bias=False)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        blocks = []
        for stage, count in enumerate(depth):
            out_channels = 64 * width * 2**stage
            for index in range(count):
                first = index == 0
                stride = 2 if first and stage > 0 else 1
                project = projection(channels, out_channels, stride, shortcut) if first else None
                blocks.append(PreActivationBottleneck(channels, out_channels, stride, project))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of images."""
        x = self.blocks(self.pool(self.stem(x)))
        x = F.relu(self.bn(x), inplace=True)
        return self.fc(x.mean((2, 3)))
