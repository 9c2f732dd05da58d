"""Everything that is worth measuring in the few minutes of a borrowed GPU, in order.

`launch/gpu_measure.sh` starts it. A plan of blocks, each of commands that the package
has anyway, under a timeout of its own; what a block found is written at once, and a
second start goes on where the first one ended. This file, `blocks`, `runner`,
`summary`, `archive` and `wheels` load nothing but the standard library and
`samrobust.system.files`: they run before what is missing on the machine is installed.
"""

__all__ = []
