"""Picture of trainings: loss and accuracy by epoch, a panel a number, a line a row."""

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from samrobust.experiments.reporting import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_training"]

_PANELS = {  # of a line in `metrics.jsonl`
    "loss": "loss of training",
    "accuracy": "accuracy on what it trains on, %",
    "validation_natural": "held-out natural, %",
    "validation_robust": "held-out robust, %",
}
_WIDTH = 2.6  # inches, of a panel

Lines = Sequence[Mapping[str, Any]]


def draw_training(runs: Mapping[str, tuple[str, Sequence[Lines]]]) -> "Figure":
    """Draws the epochs of finished runs, means over seeds.

    Args:
      runs: by row, its label and the lines of `metrics.jsonl` of each of its runs.
    """
    known = {
        key for _, own in runs.values() for lines in own for x in lines for key in x
    }
    shown = [key for key in _PANELS if key in known]
    size = (max(6.0, 0.6 + _WIDTH * len(shown)), 2.9 + 0.07 * len(runs))
    figure, panels = pictures.make_panels(
        len(shown), size, "Training, by epoch", 75, sharey=False
    )
    looks = pictures.row_looks(runs)
    for panel, key in zip(panels, shown, strict=True):
        for row, (label, own) in runs.items():
            look: dict[str, Any] = looks[row] | {"marker": ""}
            means = _means(own, key)
            panel.plot(*means, **look, label=pictures.in_symbols(label))
        panel.set_title(_PANELS[key], fontsize=pictures.TEXT)
        panel.tick_params(labelsize=pictures.SMALL, length=2)
        panel.grid(axis="y", color=pictures.PALE, linewidth=0.6)
        panel.locator_params(axis="x", integer=True)
    counts = [len(own) for _, own in runs.values()]
    over = pictures.over_seeds(counts)
    said = over if over == "one seed" else f"mean over {over}"
    said += "; adversarial training trains on attacked images"
    columns = 4 if len(shown) > 2 else 3
    pictures.add_legend(figure, panels[0].get_lines(), said, columns=columns)
    return figure


def _means(runs: Sequence[Lines], key: str) -> tuple[list[int], list[float]]:
    """Returns the epochs that all runs of a row have, and the means of a number."""
    values = [{x["epoch"]: x[key] for x in lines if key in x} for lines in runs]
    epochs = sorted(set.intersection(*(set(own) for own in values)))
    return epochs, [statistics.fmean(own[epoch] for own in values) for epoch in epochs]
