"""Tables and plots of finished runs: mean and spread, the paper's number, the doubt.

    table = summarise(results, rows=rows, paper=paper, caption=caption)
    console.print(to_rich(table))
    write_table(table, directory)  # table.md, table.csv, table.json, table.png

Accuracies are percentages; the radius of an attack is in 1/255, as in the names of
the columns, `"linf 1/255"`. Importing this package imports neither JAX nor
Matplotlib.
"""

from samrobust.experiments.reporting.files import write_table
from samrobust.experiments.reporting.notes import notes
from samrobust.experiments.reporting.plot import plot
from samrobust.experiments.reporting.render import to_csv, to_json, to_markdown
from samrobust.experiments.reporting.table import (
    Cell,
    Difference,
    Row,
    Table,
    summarise,
)
from samrobust.experiments.reporting.terminal import to_rich

__all__ = [
    "Cell",
    "Difference",
    "Row",
    "Table",
    "notes",
    "plot",
    "summarise",
    "to_csv",
    "to_json",
    "to_markdown",
    "to_rich",
    "write_table",
]
