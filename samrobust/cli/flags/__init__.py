"""The flags of every subcommand, nothing else.

No JAX and no Flax here: `--help` stays quick.
"""

from samrobust.cli.flags.evaluation import add_curves, add_evaluate, add_recheck
from samrobust.cli.flags.interchange import add_export, add_import
from samrobust.cli.flags.measurement import add_bench, add_theory
from samrobust.cli.flags.training import add_status, add_table, add_train

__all__ = ["ADDERS"]

ADDERS = (
    add_table,
    add_train,
    add_status,
    add_evaluate,
    add_recheck,
    add_curves,
    add_bench,
    add_theory,
    add_export,
    add_import,
)
