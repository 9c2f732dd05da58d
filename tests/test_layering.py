"""The architecture, held: which room may import which, and how long a module may be."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

import samrobust

ROOT = pathlib.Path(samrobust.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# From the bottom up: a module imports from rows above it here, and its own room.
LAYERS = [
    {"types", "checks"},
    {"system", "attacks", "sharpness"},
    {"data", "models"},
    {"training"},
    {"evaluation"},
    {"experiments"},
    {"studies"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
TWIN = "samrobust.studies.bench.twin"


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


NAMES = {name_of(path): path for path in MODULES}
ALL = NAMES | {name_of(path): path for path in ROOT.parent.glob("launch/**/*.py")}


def room(module: str) -> str:
    """`samrobust.attacks.pgd` belongs to `attacks`."""
    return module.split(".")[1]


def imports_of(path: pathlib.Path) -> set[str]:
    """The modules of samrobust that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in NAMES else node.module or "")
    return {name for name in found if name.startswith("samrobust.")}


def test_the_house_has_ten_rooms_and_three_modules():
    found = {path.name for path in ROOT.iterdir() if path.suffix == ".py"}
    assert found == {"__init__.py", "types.py", "checks.py"}
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms == set(RANK) - {"types", "checks"}
    assert len(found) + len(rooms) == 13


def test_a_module_imports_from_lower_layers_only():
    wrong = [
        f"{name} must not import {other}"
        for name in NAMES.keys() - {"samrobust"}
        for other in imports_of(NAMES[name])
        if room(other) != room(name) and RANK[room(other)] >= RANK[room(name)]
    ]
    assert wrong == []


def test_no_imports_run_in_a_circle():
    graph = {name: imports_of(path) - {name} for name, path in NAMES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_twin_in_pytorch_shares_the_stopwatch_and_no_computation():
    shared = {"samrobust.checks", "samrobust.studies.bench.timing"}
    shared.add("samrobust.experiments.robustbench_model")  # needs PyTorch alone
    twin = [path for name, path in NAMES.items() if name.startswith(TWIN)]
    assert len(twin) > 1
    others = set().union(*map(imports_of, twin)) - shared
    assert [other for other in others if not other.startswith(TWIN)] == []


def test_private_names_of_jax_stand_in_one_module():
    private = re.compile(r"jax\._src|unittest")
    found = {name for name, path in NAMES.items() if private.search(path.read_text())}
    assert found == {"samrobust.system.jax_internals"}


def lines_of_code(path: pathlib.Path) -> int:
    """How many lines hold code, and not docstrings, comments or nothing."""
    text = path.read_text()
    told: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            told.update(range(node.lineno, (node.end_lineno or 0) + 1))
    numbered = enumerate(text.splitlines(), start=1)
    kept = [line.strip() for number, line in numbered if number not in told]
    return sum(1 for line in kept if line and not line.startswith("#"))


def test_a_quarter_of_the_code_is_what_the_package_is_for():
    """The rest reads configs, keeps runs and shows numbers."""
    core = re.compile(
        r"samrobust\.((attacks|sharpness|models|types|checks)"
        r"|training\.(adversaries|objectives|averaging|parts|step))(\.|$)"
    )
    lines = {name: lines_of_code(path) for name, path in NAMES.items()}
    share = sum(n for name, n in lines.items() if core.match(name))
    assert share / sum(lines.values()) >= 0.25


def test_a_module_is_readable_at_one_sitting():
    lengths = {n: len(path.read_text().splitlines()) for n, path in ALL.items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_a_module_says_what_it_is_for_and_what_it_offers():
    trees = {name: ast.parse(path.read_text()) for name, path in ALL.items()}
    assert [name for name, tree in trees.items() if not ast.get_docstring(tree)] == []
    offers = {
        name
        for name, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id == "__all__"
    }
    assert trees.keys() == offers


def modules_after(statement: str) -> set[str]:
    """What a fresh Python has loaded after a statement."""
    script = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


def test_the_package_imports_its_public_names_when_they_are_used():
    loaded = modules_after("import samrobust")
    assert "jax" not in loaded
    assert not {name for name in loaded if name.startswith("samrobust.")}


@pytest.mark.parametrize("library", ["samrobust.attacks", "samrobust.sharpness"])
def test_the_libraries_import_nothing_of_experiments(library):
    loaded = modules_after(f"import {library}")
    heavy = "flax orbax tensorflow_datasets ml_collections sklearn matplotlib rich"
    assert not set(heavy.split()) & loaded
    rooms = {room(name) for name in loaded if name.startswith("samrobust.")}
    assert rooms <= {"types", "checks", "attacks", "sharpness"}


def test_the_twin_in_pytorch_loads_no_jax():
    pytest.importorskip("torch")
    assert "jax" not in modules_after(f"import {TWIN}.reference")
