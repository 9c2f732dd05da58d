"""The architecture, held: which module may import which, and how long one may be."""

import ast
import pathlib
import subprocess
import sys

import pytest

import samrobust

ROOT = pathlib.Path(samrobust.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# From the bottom up: a module imports from rows above it here, and its own package.
LAYERS = [
    {"types", "checks"},
    {"comparable", "files", "runtime", "provenance", "resolve"},
    {"objectives", "claims", "failures"},
    {"attacks", "sharpness", "models", "data", "parallel"},
    {"survey"},
    {"training", "evaluation"},
    {"entries"},
    {"rows"},
    {"methods"},
    {"components"},
    {"validation"},
    {"configuration"},
    {"identity", "tracking", "building"},
    {"workdir", "runfiles"},
    {"networks"},
    {"scoring"},
    {"experiments", "reporting"},
    {"bench", "interchange", "sanity", "sweep", "status", "theory"},
    {"curves", "evaluate", "recheck", "table"},
    {"commands", "flags"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def part(module: str) -> str:
    """`samrobust.attacks.pgd` belongs to `attacks`."""
    return module.split(".")[1]


def imports_of(path: pathlib.Path) -> set[str]:
    """The parts of samrobust that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "samrobust":
            names = [f"samrobust.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module or ""]
        else:
            continue
        found |= {part(name) for name in names if name.startswith("samrobust.")}
    return found - {"__version__"}


def own_part(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_from_lower_layers_only(path):
    own = own_part(path)
    if own == "__init__":
        assert not imports_of(path)
        return
    for imported in imports_of(path) - {own}:
        assert RANK[imported] < RANK[own], f"{own} must not import {imported}"


def test_every_part_has_its_layer():
    assert {own_part(path) for path in MODULES} - {"__init__"} == set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_readable_at_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is_for_and_what_it_offers(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    targets = [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    assert "__all__" in targets or path == ROOT / "__init__.py"


@pytest.mark.parametrize("library", ["samrobust.attacks", "samrobust.sharpness"])
def test_the_libraries_import_nothing_of_experiments(library):
    heavy = "flax orbax tensorflow_datasets ml_collections sklearn matplotlib rich"
    script = (
        f"import sys, {library}\n"
        f"loaded = [m for m in {heavy.split()} if m in sys.modules]\n"
        "inside = [m for m in sys.modules if m.startswith('samrobust.')]\n"
        "print(loaded, [m for m in inside if m.split('.')[1] in"
        " ('data', 'training', 'evaluation', 'configuration', 'building')])"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    assert output.strip() == "[] []"
