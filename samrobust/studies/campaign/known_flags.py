"""`samrobust bench` with those of XLA's options that this version knows.

    python -m samrobust.studies.campaign.known_flags FILE bench --xla-flags=... ...

A bench refuses the others before its first row. FILE, `left_out.json`, says which they
are, and why.
"""

import os
import pathlib
import sys

from samrobust.system.compiler import check_compiler_options, try_here
from samrobust.system.files import write_json

__all__ = ["main"]

_FLAG = "--xla-flags="


def main() -> None:
    """Asks XLA of each option, then becomes the bench."""
    file, words, left_out = pathlib.Path(sys.argv[1]), [], {}
    for word in sys.argv[2:]:
        flags = word.removeprefix(_FLAG) if word.startswith(_FLAG) else ""
        try:
            if flags:
                check_compiler_options(flags, try_here)
            words.append(word)
        except ValueError as error:
            left_out[flags] = str(error)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, left_out)
    # What JAX took of the device goes with this program.
    os.execv(sys.executable, [sys.executable, "-m", "samrobust.cli", *words])


if __name__ == "__main__":
    main()
