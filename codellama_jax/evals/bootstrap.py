"""How sure a measured ratio is: resample the documents, see how much it moves."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SAMPLES = 2_000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval and standard error."""

    mean: float
    low: float
    high: float
    error: float


def interval(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    groups: Sequence[int] | None = None,
) -> Interval:
    """sum(values) / sum(weights) with a bootstrap over `groups` (default: every value its own).

    What comes from one document belongs in one group: its parts are not independent. For a paired
    difference pass the differences as values. Equal inputs give equal results.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    ids = np.arange(len(values)) if groups is None else np.asarray(groups)
    _, group = np.unique(ids, return_inverse=True)
    sums, totals = np.bincount(group, values), np.bincount(group, weights)
    chosen = np.random.default_rng(0).integers(len(sums), size=(SAMPLES, len(sums)))
    ratios = sums[chosen].sum(1) / totals[chosen].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    mean = values.sum() / weights.sum()
    return Interval(float(mean), float(low), float(high), float(ratios.std()))
