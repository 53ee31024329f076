"""Mean and scale of one tensor over a zoo, in one pass: what weight tokens are standardised with.

Reference: the merge of two sets of moments in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
computing sample variances" (1979).
"""

import math

from torch import Tensor


NARROW_DTYPES = {"float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"}  # restored bit for bit

# A float32 token of magnitude below 16 is rounded by at most 2**-21, and rounding the restored weight to its own dtype
# at most doubles that: 0.95e-6 of the std. Tensors with larger outliers get a lossless scale instead.
MAX_ROUNDED_TOKEN = 16.0
# bfloat16 goes down to 2**-133 and float32 to 2**-149: a larger scale would push its smallest numbers out of float32.
MAX_NARROW_EXPONENT = 16


class Moments:
    """Running count, mean, sum of squared deviations and range of one tensor over a zoo, in float64."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, tensor: Tensor, what: str) -> None:
        values = flat(tensor).double()
        if not values.numel():
            return
        low, high = (bound.item() for bound in values.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):  # aminmax hands NaN on
            raise ValueError(
                f"{what} has a weight that is NaN or infinite; remove the checkpoint or repair the tensor."
            )
        mean = values.mean().item()
        squares = (values - mean).square().sum().item()
        total = self.count + values.numel()
        shift = mean - self.mean
        self.squares += squares + shift * shift * self.count * values.numel() / total
        self.mean += shift * values.numel() / total
        self.count = total
        self.low, self.high = min(self.low, low), max(self.high, high)

    def mean_and_std(self, dtype: str) -> tuple[float, float]:
        """What to standardise with: the moments, or a lossless scale where float32 tokens would round too much."""
        if not self.count:
            return 0.0, 1.0
        constant = self.low == self.high
        mean, std = (self.low, 1.0) if constant else (self.mean, math.sqrt(self.squares / self.count))
        if dtype not in NARROW_DTYPES:
            furthest = max(self.high - mean, mean - self.low)
            if constant or dtype == "float64" or furthest < MAX_ROUNDED_TOKEN * std:
                return mean, std or 1.0
        # Dividing by a power of two only changes the exponent; subtracting a mean would lose the last bits.
        size = math.hypot(mean, 0.0 if constant else std)  # root mean square
        exponent = round(math.log2(size)) if size else 0
        return 0.0, 2.0 ** max(-100, min(exponent, MAX_NARROW_EXPONENT if dtype in NARROW_DTYPES else 100))


def flat(tensor: Tensor) -> Tensor:
    """All scalars in row-major order, on the CPU and cut off from any graph."""
    return tensor.detach().reshape(-1).cpu()
