"""The language, held: how docstrings open, US spelling, and a class for each name."""

import ast
import collections
import functools
import pathlib
import re
from collections.abc import Iterator

import samrobust

ROOT = pathlib.Path(samrobust.__file__).parent
MODULES = sorted([*ROOT.rglob("*.py"), *ROOT.parent.glob("launch/gpu_measure/*.py")])
TWIN = ROOT / "studies" / "bench" / "twin"  # named after what it mirrors
PAGES = MODULES + [
    page
    for folder in ("configs", "docs", "examples", "launch")
    for page in sorted((ROOT.parent / folder).rglob("*"))
    if page.suffix in (".ipynb", ".md", ".py") and page not in MODULES
]
PAGES += [ROOT.parent / name for name in ("README.md", "CONTRIBUTING.md")]

# Plurals and others that end as a verb in the third person does.
NOT_A_VERB = re.compile(
    "Always|Arrays|Batches|Bytes|Channels|Class|Classes|Deviations|Examples|Fields"
    "|Floats|Gradients|Hours|Images|Keys|Labels|Logits|Losses|Numbers|Operations|Others"
    "|Pairs|Paths|Pixels|Process|Radius|Rows|Seconds|Seeds|Steps|Tasks|This|Values"
    "|Weights|Zeros"
)
# A class is a thing: no question, not what it does, not what is done to it.
NOT_A_NOUN = re.compile(
    "What|Who|How|Whether|Which|Where|When|From|Of|For|To|Is|All|See|Every|Everything"
    "|[A-Z][a-z]+ed"
)
# In names too, so inside of words.
BRITISH = re.compile(
    r"colour|behaviour|neighbour|favour|honour|flavour|rigour|grey|centre|fibre|defence"
    r"|licence|artefact|catalogue|judgement|labelled|labelling|modelling|cancelled|spelt"
    r"|towards|(analy|characteri|factori|finali|generali|initiali|materiali|maximi"
    r"|minimi|normali|optimi|organi|paralleli|penali|quanti|randomi|reali|recogni"
    r"|regulari|seriali|speciali|stabili|standardi|summari|synchroni|utili|vectori"
    r"|visuali)s(e[drs]?\b|ing|ation)",
    re.IGNORECASE,
)
ARCHAIC = re.compile(
    r"\b(afresh|amongst|anew|but for|in between|lest|mend|mends|nought|seldom|thereof"
    r"|thrice|whence|whilst|whomever)\b",
    re.IGNORECASE,
)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def id_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT.parent))


def described(path: pathlib.Path) -> Iterator[tuple[Definition, str, str]]:
    """Definitions with a docstring, the docstring's first word, and where it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Definition) and (text := ast.get_docstring(node)):
            line = text.splitlines()[0]
            yield node, line.split()[0], f"{id_of(path)}:{node.lineno}: {line}"


@functools.cache
def all_described() -> list[tuple[Definition, str, str]]:
    return [found for path in MODULES for found in described(path)]


def is_property(node: Definition) -> bool:
    return any("property" in ast.unparse(name) for name in node.decorator_list)


def is_verb(word: str) -> bool:
    looks_like_one = re.fullmatch("[A-Z][a-z-]*s,?", word)
    return bool(looks_like_one) and not NOT_A_VERB.fullmatch(word)


def test_a_functions_docstring_opens_with_a_verb_in_the_third_person():
    wrong = [
        line
        for node, word, line in all_described()
        if not (is_verb(word) or is_property(node) or isinstance(node, ast.ClassDef))
    ]
    assert not wrong, "\n".join(wrong)


def test_a_classs_docstring_opens_with_what_it_is():
    verbs = {
        word
        for node, word, _ in all_described()
        if is_verb(word) and not isinstance(node, ast.ClassDef)
    }
    wrong = [
        line
        for node, word, line in all_described()
        if isinstance(node, ast.ClassDef)
        and (word in verbs or NOT_A_NOUN.fullmatch(word))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_two_classes_share_a_name():
    places = collections.defaultdict(list)
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and TWIN not in path.parents:
                places[node.name.lstrip("_")].append(id_of(path))
    assert {name: at for name, at in places.items() if len(at) > 1} == {}


def test_the_words_are_those_of_an_american_engineer_today():
    wrong = [
        f"{id_of(path)}:{number}: {line.strip()}"
        for path in PAGES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BRITISH.search(line) or ARCHAIC.search(line)
    ]
    assert not wrong, "\n".join(wrong)
