"""Objects named as package.module:name: found, and what is said where they are not."""

import hashlib
import sys

import helpers
import pytest

from samrobust.system import resolve as resolving
from samrobust.system.resolve import is_reference, resolve, sources


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a module into the current directory, and forgets it afterwards."""

    def make(text, name="mine"):
        (tmp_path / f"{name}.py").write_text(text)
        for known in ("mine", "other"):
            monkeypatch.delitem(sys.modules, known, raising=False)

    monkeypatch.chdir(tmp_path)
    yield make
    for name in ("mine", "other"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, True) for text in ("a:b", "a.b:c", "a_1.b.c:d2")),
        *((text, False) for text in ("a", "a.b", ":a", "a:", "a:b:c", "a..b:c")),
        *((text, False) for text in ("mnist:3.0.1", "configs/x.py:st", "a b:c", "")),
        *((text, False) for text in ("st,rho=1", "./a:b", "gs://a:b", "a.b:c.d")),
    ],
)
def test_a_reference_is_a_dotted_module_a_colon_and_a_name(text, expected):
    assert is_reference(text) is expected


def test_a_module_in_the_current_directory_is_found_and_the_path_left_as_it_was(write):
    write("from other import half\ntwo = 2 * half")
    write("half = 1", "other")
    before = list(sys.path)
    assert resolve("mine:two", "a number") == 2
    assert sys.path == before


def test_the_current_directory_hides_no_installed_module(write):
    write("tau = 3", "math")
    write("pi = 3", "colorsys")
    assert resolve("math:tau", "a number") > 6
    assert callable(resolve("colorsys:rgb_to_hsv", "a function"))


def test_a_folder_of_the_path_is_looked_in_as_ever(write, monkeypatch, tmp_path):
    write("one = 1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("mine:one", "a number") == 1


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "nothing",
            "Expected a number as package.module:name, got reference='nothing'",
        ),
        (
            "gone.far:x",
            "Expected a module gone with a number, got reference='gone.far:x'. Run in "
            "the folder that holds gone.py, or add that folder to PYTHONPATH.",
        ),
        ("mine.far:x", "Expected a module mine.far with a number, .* mine/far.py,"),
        ("mine.py:three", "a module mine.py with .* without .py: mine:three."),
        ("mine:thre", "Expected a number thre in .*mine.py, .* It has three, Four.$"),
        ("mine:os.path", "as package.module:name"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(write, reference, message):
    write("import os\n_hidden = 1\nthree = 3\nclass Four: ...\n")
    with pytest.raises(ValueError, match=message) as error:
        resolve(reference, "a number")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("\nx = 1 / 0", "mine.py, line 2: ZeroDivisionError: division by zero"),
        ("x = 1\ny = (", "mine.py, line 2: SyntaxError: '.' was never closed"),
        ("import gone", "mine.py, line 1: ModuleNotFoundError: No module named 'gone'"),
        ("raise ValueError('a\\nb')", "mine.py, line 1: ValueError: a b"),
        ("import sys\nsys.exit('bye')", "mine.py, line 2: SystemExit: bye"),
        ("import json\n\njson.loads('{')", "mine.py, line 3: JSONDecodeError: .*"),
        ("import other", "other.py, line 1: NameError: name 'y' is not defined"),
    ],
)
def test_a_module_that_fails_is_blamed_by_file_and_line(write, text, failure):
    write("x = y", "other")
    write(text)
    message = f"Expected the module mine with a number to run, got at .*{failure}$"
    with pytest.raises(ValueError, match=message) as error:
        resolve("mine:x", "a number")
    assert "\n" not in str(error.value)


def test_an_error_that_arose_nowhere_is_still_told():
    message = "Expected it to run, got: KeyError: 'a'"
    assert str(resolving._failure_of("it", KeyError("a"))) == message


def test_the_source_of_somebodys_own_code_is_known_as_it_was_imported(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "where_defined.py").write_text("def made(): ...\n")
    (tmp_path / "where_named.py").write_text("from where_defined import made\n")
    found = sources(["where_named:made", "math:tau", "optax:adam"])
    assert found.keys() == {"where_named", "where_defined"}
    text = (tmp_path / "where_named.py").read_bytes()
    assert found["where_named"] == hashlib.sha256(text).hexdigest()
    (tmp_path / "where_named.py").write_text("made = 3\n")
    assert sources(["where_named:made"]) == found


def test_a_file_beside_the_package_whose_path_begins_alike_is_ones_own():
    package = str(helpers.ROOT / "samrobust")
    for file, is_own in ((f"{package}_mine.py", True), (f"{package}/mine.py", False)):
        assert file.startswith(resolving._INSTALLED) is not is_own
