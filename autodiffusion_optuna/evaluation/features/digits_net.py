"""The small convolutional classifier whose penultimate layer scores handwritten digits offline.

It is a stand-in for Inception on 28x28 grey images: a classifier's features ignore what a reader
of digits ignores, so a Fréchet distance over them rises when strokes break or digits stop being digits.
"""

from __future__ import annotations

from torch import Tensor, nn

FEATURES = 64
CLASSES = 10


class DigitsNet(nn.Module):
    """Logits float32 [B, 10] of ``images`` float32 [B, 1, 28, 28] in [0, 1]."""

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
        """The 64 non-negative numbers before the last layer, float32 [B, 64]."""
        embedded: Tensor = self.embed(self.trunk(images))
        return embedded

    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 [B, 10]."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _block(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(channels_out), nn.ReLU()
