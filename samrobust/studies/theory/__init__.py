"""Section 4 of the paper, checked: robust and non-robust features in a linear world.

What ST, AT and SAM do to the weight of the robust feature: as formulas, printed and
corrected (`closed_forms`), as direct minima of the exact loss (`population`), and
trained (`experiment`). `samrobust theory` puts them side by side; docs/theory.md
derives them.
"""

from samrobust.studies.theory.study import Grid, study
from samrobust.studies.theory.verdicts import judge
from samrobust.studies.theory.world import World, sample

__all__ = ["Grid", "World", "judge", "sample", "study"]
