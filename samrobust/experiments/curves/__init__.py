"""Accuracy against the radius of the attack, for all runs of a table.

`samrobust curves` measures and draws; docs/sanity.md says how to read the picture.
"""

from samrobust.experiments.curves.drawing import draw_curves
from samrobust.experiments.curves.measure import (
    Curve,
    CurveSettings,
    curves_of,
    measure_run,
)

__all__ = ["Curve", "CurveSettings", "curves_of", "draw_curves", "measure_run"]
