"""Tables and plots of finished runs: mean and spread, the paper's number, the doubt.

    table = summarize(results, rows=rows, paper=paper, caption=caption)
    console.print(to_rich(table))
    write_table(table, directory)  # table.md, table.csv, table.json, table.png

Accuracies are percentages; the radius of an attack is in 1/255, as in the names of
the columns, `"linf 1/255"`. Importing this package imports neither JAX nor
Matplotlib.
"""

from samrobust.experiments.reporting.render import to_rich, write_table
from samrobust.experiments.reporting.table import Table, summarize

__all__ = ["Table", "summarize", "to_rich", "write_table"]
