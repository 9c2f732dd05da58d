"""`samrobust completion`: what a shell offers for a line that is typed."""

import shlex
import shutil
import subprocess

import pytest

from samrobust import cli

CASES = {
    "samrobust tab": ["table"],
    "samrobust s": ["sharpness", "status"],
    "samrobust help ex": ["export"],
    "samrobust table --seeds": ["--seeds-per-program=", "--seeds="],
    "samrobust table --workdir=x --col": ["--collect"],
    "samrobust evaluate --workdir=x --attack=a": ["autoattack"],
    "samrobust table --workdir=ru": [],  # files, by the shell itself
    "samrobust completion z": ["zsh"],
}


@pytest.mark.parametrize("line", CASES)
def test_bash_completes_commands_flags_and_choices(line, capsys):
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    assert cli.main(["completion", "bash"]) == 0
    words = [part for word in line.split() for part in word.replace("=", " = ").split()]
    typed = (
        f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_CWORD="
        f"{len(words) - 1} COMP_WORDS=({' '.join(map(shlex.quote, words))})\n"
    )
    shown = '_samrobust; for word in "${COMPREPLY[@]}"; do echo "$word"; done'
    done = subprocess.run(
        ["bash", "-uc", capsys.readouterr().out + typed + shown],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split()) == sorted(CASES[line])


def test_zsh_gets_the_same_words_by_its_bashcompinit(capsys):
    shells = {}
    for shell in ("bash", "zsh"):
        assert cli.main(["completion", shell]) == 0
        shells[shell] = capsys.readouterr().out.splitlines()
    first, *same, last = shells["zsh"]
    assert first == "autoload -U +X bashcompinit && bashcompinit"
    assert same == shells["bash"][:-1]
    assert last == "complete -o default -o nospace -F _samrobust samrobust"
