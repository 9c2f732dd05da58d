"""Rank correlation of runs, and how sure it is where runs of a method are alike."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["LEAST_FOR_INTERVAL", "RankCorrelation", "rank_correlation"]

# With fewer groups a resample often holds three or four different ones, and the
# interval covers far less often than it says.
LEAST_FOR_INTERVAL = 8
_RESAMPLES = 2000


class RankCorrelation(NamedTuple):
    """Spearman's rank correlation with its bootstrap interval.

    Attributes:
      n: number of pairs.
      rho: in [-1, 1]; None with fewer than three pairs, or where all ranks tie.
      interval: of 95 %; None with fewer than eight groups.
    """

    n: int
    rho: float | None = None
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        """Returns the correlation as printed: `-0.83 [-0.95, -0.41]`."""
        if self.rho is None:
            return "-"
        if self.interval is None:
            return f"{self.rho:+.2f}"
        return "{:+.2f} [{:+.2f}, {:+.2f}]".format(self.rho, *self.interval)

    @property
    def is_sure(self) -> bool:
        """Whether there is an interval, and 0 lies outside of it."""
        return self.interval is not None and self.interval[0] * self.interval[1] > 0


def rank_correlation(
    one: Sequence[float], other: Sequence[float], groups: Sequence[Hashable]
) -> RankCorrelation:
    """Returns Spearman's correlation of pairs, ties at their mean rank.

    The interval holds 95 % of the correlations of 2000 samples of as many groups, drawn
    whole and with replacement, always the same: the percentile bootstrap of clusters.

    Args:
      one: finite numbers.
      other: as many.
      groups: what each pair belongs to, as a run to its method; pairs of a group may be
        alike in any way, groups are taken to be independent.

    Reference: Spearman (1904); Davison and Hinkley (1997), "Bootstrap Methods and their
    Application", 3.8.

    >>> str(rank_correlation([1, 2, 3, 4], [1, 4, 9, 16], "aabb"))
    '+1.00'
    """
    pairs, n = np.array([one, other], float), len(groups)
    (rho,) = _correlate(pairs, np.ones([1, n])) if n >= 3 else (np.nan,)
    if np.isnan(rho):
        return RankCorrelation(n)
    found = RankCorrelation(n, float(rho))
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    count = len(numbers)
    if count < LEAST_FOR_INTERVAL:
        return found
    drawn = np.random.default_rng(0).multinomial(count, [1 / count] * count, _RESAMPLES)
    resampled = _correlate(pairs, drawn[:, [numbers[group] for group in groups]])
    low, high = np.nanpercentile(resampled, (2.5, 97.5))  # NaN: all of a sample tie
    return found._replace(interval=(float(low), float(high)))


def _correlate(pairs: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Returns the correlations [M] of M samples; NaN where all ranks tie.

    Args:
      pairs: [2, N].
      times: how often a pair is in a sample, [M, N].
    """

    def centered_ranks(values: np.ndarray) -> np.ndarray:
        """Ranks in each sample [M, N], without the half that all have in common."""
        below = (values[:, None] < values) + (values[:, None] == values) / 2
        ranks = times @ below
        mean = np.sum(times * ranks, 1, keepdims=True) / np.sum(times, 1, keepdims=True)
        return ranks - mean

    one, other = map(centered_ranks, pairs)
    product, *squares = (
        np.sum(times * a * b, axis=1)
        for a, b in ((one, other), (one, one), (other, other))
    )
    lengths = np.sqrt(squares[0] * squares[1])
    return np.where(lengths > 0, product / np.where(lengths > 0, lengths, 1), np.nan)
