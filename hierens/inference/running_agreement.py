"""The agreement with the full ensemble while serving, with its uncertainty, and whether it is as expected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

_MEMORY = 100  # images of the moving averages
_FEWEST = 40  # images for a decision: they are about the first with which points can be fitted
_Z = NormalDist().inv_cdf(0.95)  # of each limit


@dataclass
class RunningAgreement:
    """Exponential moving averages over images: whether the prediction agreed, and the agreement that was expected.

    Attributes:
        weight: sum of the images' weights.
        squares: sum of their squares.
        agreed: sum of the weights of the images whose prediction agreed.
        expected: sum of the weights times the expected agreement.
    """

    weight: float = 0.0
    squares: float = 0.0
    agreed: float = 0.0
    expected: float = 0.0

    def add(self, agreed: bool, expected: float) -> None:
        """Record an image."""
        decay = 1 - 1 / _MEMORY
        self.weight, self.squares = decay * self.weight + 1, decay**2 * self.squares + 1
        self.agreed, self.expected = decay * self.agreed + agreed, decay * self.expected + expected

    def interval(self) -> tuple[float, float, float]:
        """Lower limit, mean and upper limit: Wilson's interval (1927) for the effective number of images, 90 %."""
        if not self.weight:
            return 0.0, math.nan, 1.0
        count, mean = self.weight**2 / self.squares, self.agreed / self.weight
        centre, scale = mean + _Z**2 / (2 * count), 1 + _Z**2 / count
        width = _Z * math.sqrt(max(mean * (1 - mean), 0.0) / count + (_Z / (2 * count)) ** 2)
        return (centre - width) / scale, mean, (centre + width) / scale

    def unsure(self, bound: float) -> bool:
        """Whether too few images are known for a decision, or their mean is below a bound."""
        return self.weight < _FEWEST or self.agreed < bound * self.weight

    def drifted(self, bound: float) -> bool:
        """Whether it is significantly below a bound and what was expected, or above what was expected."""
        if self.weight < _FEWEST:
            return False
        low, _, high = self.interval()
        expected = self.expected / self.weight
        return high < min(bound, expected) or low > expected
