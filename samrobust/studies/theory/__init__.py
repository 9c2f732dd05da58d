"""Section 4 of the paper, checked: robust and non-robust features in a linear world.

What ST, AT and SAM do to the weight of the robust feature: as formulas, printed and
corrected (`closed_forms`), as direct minima of the exact loss (`population`), and
trained (`experiment`), over the worlds of a `study.Grid`. `samrobust theory` puts them
side by side; docs/theory.md derives them.
"""

__all__ = []
