"""The small convolutional classifier whose penultimate layer scores handwritten digits offline.

It is a stand-in for Inception on 28x28 grey images: a classifier's features ignore what a reader
of digits ignores, so a Fréchet distance over them rises when strokes break or digits stop being digits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEATURES = 64
CLASSES = 10


class DigitsNet(nn.Module):
    """Digits classifier; ``features`` gives the 64 numbers before the last layer.

    Input: float32 [B, 1, 28, 28] in [0, 1]. Output of ``forward``: logits float32 [B, 10].
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_block(1, 16),
            nn.MaxPool2d(2),
            *_block(16, 32),
            *_block(32, 48),
            nn.MaxPool2d(2),
            *_block(48, 64),
            *_block(64, 64),
            nn.AvgPool2d(kernel_size=3, stride=2),
            nn.Flatten(),
        )
        self.embed = nn.Sequential(nn.Linear(64 * 3 * 3, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Non-negative features float32 [B, 64] of ``images`` float32 [B, 1, 28, 28] in [0, 1]."""
        embedded: Tensor = self.embed(self.trunk(images))
        return embedded

    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 [B, 10]."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _block(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def load_digits_net(state: dict[str, Tensor]) -> DigitsNet:
    """The classifier in eval mode with the given state dict (``RuntimeError`` where shapes differ)."""
    net = DigitsNet()
    net.load_state_dict(state)
    frozen: DigitsNet = net.eval().requires_grad_(False)
    return frozen


def accuracy(net: DigitsNet, images: Tensor, labels: Tensor) -> float:
    """Share of ``images`` (uint8 [N, 1, 28, 28]) whose largest logit is at ``labels`` (int64 [N])."""
    with torch.inference_mode():
        hits = [
            (net(batch.float() / 255).argmax(1) == target).float()
            for batch, target in zip(torch.split(images, 500), torch.split(labels, 500), strict=True)
        ]
    return float(torch.cat(hits).mean())
