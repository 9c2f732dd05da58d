"""`samrobust bench` without what is not there: it would refuse all of its rows.

    python -m launch.gpu_measure.lenient FILE bench --xla-flags=... ...

XLA's options that this version does not know are left out, and a file of `--ceilings`
that nothing wrote. FILE, `left_out.json`, says what, and why.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

__all__ = ["main"]

_FLAGS, _CEILINGS = "--xla-flags=", "--ceilings="
# Prints a line for each of its words: what is wrong with it.
_ASK = """
import json, sys
from samrobust.system.compiler import check_compiler_options, try_here
for flags in sys.argv[1:]:
    complaint = ""
    try:
        check_compiler_options(flags, try_here)
    except ValueError as error:
        complaint = str(error)
    print(json.dumps(complaint), flush=True)
"""


def main() -> None:
    """Leaves out what is not there, then becomes the bench."""
    file, words = pathlib.Path(sys.argv[1]), sys.argv[2:]
    flags = [word.removeprefix(_FLAGS) for word in words if word.startswith(_FLAGS)]
    refused = _refused([*filter(None, flags)])
    left_out = {_FLAGS + name: complaint for name, complaint in refused.items()}
    for word in words:
        if word.startswith(_CEILINGS) and not _has_ceilings(word):
            left_out[word] = "Nothing wrote any: ceilings are measured again."
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(left_out))
    kept = [word for word in words if word not in left_out]
    os.execv(sys.executable, [sys.executable, "-m", "samrobust.cli", *kept])


def _has_ceilings(word: str) -> bool:
    with contextlib.suppress(OSError):
        return '"copy"' in pathlib.Path(word.removeprefix(_CEILINGS)).read_text()
    return False


def _refused(flags: Sequence[str]) -> dict[str, str]:
    """Returns those of XLA's options that it does not take, with its complaints.

    Asked in another process: some end it, and what JAX takes of the device goes with
    it. The next one asks of those that are left.
    """
    found, left = {}, list(flags)
    while left:
        done = subprocess.run(
            [sys.executable, "-c", _ASK, *left],
            env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        complaints = [json.loads(line) for line in done.stdout.splitlines()]
        answered, left = left[: len(complaints)], left[len(complaints) :]
        pairs = zip(answered, complaints, strict=True)
        found |= {name: complaint for name, complaint in pairs if complaint}
        if left:
            last = (done.stderr.strip().splitlines() or [""])[-1][-300:]
            found[left.pop(0)] = f"It ends XLA with exit code {done.returncode}: {last}"
    return found


if __name__ == "__main__":
    main()
