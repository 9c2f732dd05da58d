"""A leaderboard of small radii: claims in RobustBench's format, held to measurements.

RobustBench's boards are at l-inf 8/255; what training without an attack gives shows at
1/255 and 2/255. A claim is a JSON file with the fields of RobustBench's `model_info`
and, under `samrobust`, the run and the `autoattack.json` of `samrobust recheck` that it
rests on, of which the board keeps a copy. Everything that the measurement decides is
read there again whenever the board is written; a claim that says anything else is
refused.
"""

import hashlib
import itertools
import pathlib
import re
from typing import Any
from urllib.parse import quote

from samrobust.checks import check
from samrobust.experiments.reporting.notes import standard_error
from samrobust.experiments.reporting.render import from_json
from samrobust.experiments.reporting.results import attacks_version, makers
from samrobust.experiments.reporting.table import Table
from samrobust.system.files import read_object, write_bytes, write_json
from samrobust.system.tables import Sheet, TextTable

__all__ = ["add_claims", "read_claims", "to_sheet"]

_RADII = ("1/255", "2/255")  # of l-inf
# RobustBench's fields that no measurement decides: those that a claim keeps when it is
# added again, and all.
_KEPT = ("link", "name", "authors", "venue", "additional_data")
_BY_HAND = (*_KEPT, "architecture", "footnote")
# What `recheck` says of a table that both attacks judged; the bundle is float32 too.
_STANDARD = re.compile(r".*, test images, .*float32\. AA: AutoAttack, standard;.*")

Claim = dict[str, Any]


def add_claims(
    folder: pathlib.Path, rechecked: pathlib.Path, architecture: str, note: str = ""
) -> list[pathlib.Path]:
    """Writes a claim for every run and every small radius of a table.

    Of a claim that is there already, what was filled in by hand stays.

    Args:
      folder: of the leaderboard.
      rechecked: where `samrobust recheck` left `autoattack.json`.
      architecture: of the networks, in words.
      note: what a reader must know beside, such as that the training set was reduced.

    Raises:
      ValueError: if there is no such table or no small radius in it, or a measurement
        lacks what a claim rests on.
    """
    table, content = _read_table(rechecked / "autoattack.json")
    radii = [radius for radius in _RADII if f"linf {radius} AA" in table.columns]
    wanted = "AutoAttack at l-inf 1/255 or 2/255"
    fix = "Run `samrobust recheck --linf=1,2`."
    check(bool(radii), wanted, fix, columns=list(table.columns))
    # The next `recheck` replaces its table; a claim still rests on what it was made of.
    evidence = f"evidence/{_digest(content)}.json"
    (folder / "evidence").mkdir(parents=True, exist_ok=True)
    write_bytes(folder / evidence, content)
    paths = []
    for row, radius in itertools.product(table.rows, radii):
        for seed in row.seeds:
            found = _measured(table, row.name, seed, radius)
            origin = {**found.pop("samrobust"), "evidence": evidence}
            footnote = f"samrobust's AutoAttack on {table.num_test:,} test images."
            claim = {
                "link": "",
                "name": f"{row.label}, seed {seed}",
                "authors": "",
                "additional_data": False,
                "number_forward_passes": 1,
                "venue": "",
                "architecture": architecture,
                **found,
                "footnote": f"{footnote} {note}".strip(),
                "samrobust": origin,
            }
            path = folder / _place(claim)
            path.parent.mkdir(parents=True, exist_ok=True)
            before = read_object(path) or {}
            kept = {name: before[name] for name in _KEPT if before.get(name)}
            write_json(path, {**claim, **kept})
            paths.append(path)
    return paths


def _place(claim: Claim) -> pathlib.PurePath:
    """Returns where a board has a claim: networks of one row and seed beside others."""
    origin, dataset = claim["samrobust"], quote(claim["dataset"], safe="")
    radius = claim["eps"].replace("/", "-")
    name = f"{origin['row']}-seed{origin['seed']}-{origin['identity']}.json"
    return pathlib.PurePath(dataset, f"linf-{radius}", name)


def read_claims(folder: pathlib.Path) -> list[Claim]:
    """Returns the claims of a leaderboard, each held to what it rests on.

    Raises:
      ValueError: if there is none, or one lacks a field, has one more, or says what was
        not measured; names the file and the field.
    """
    paths = sorted(folder.glob("*/linf-*/*.json"))
    check(bool(paths), "claims in --workdir", "Add some: --add.", workdir=str(folder))
    claims = []
    for path in paths:
        claim = read_object(path) or {}
        _check_claim(claim, folder, path.relative_to(folder).as_posix())
        claims.append(claim)
    return claims


def _check_claim(claim: Claim, folder: pathlib.Path, name: str) -> None:
    """Refuses a claim that is not what its evidence says."""
    origin = claim.get("samrobust")
    known = isinstance(origin, dict) and {"evidence", "row", "seed"} <= origin.keys()
    check(known, "a claim with samrobust.evidence, row and seed", claim=name)
    assert isinstance(origin, dict)
    path = folder / str(origin["evidence"])
    table, content = _read_table(path)
    wanted = "evidence as it was added, which is named by its digest"
    own = _digest(content)
    check(path.stem == own, wanted, claim=name, evidence=path.name, digest=own)
    found = _measured(table, origin["row"], origin["seed"], claim.get("eps"))
    fields = {*_BY_HAND, *found}
    lacking, more = sorted(fields - claim.keys()), sorted(claim.keys() - fields)
    wanted = "RobustBench's fields"
    check(not (lacking or more), wanted, claim=name, lacking=lacking, more=more)
    for field in _BY_HAND:
        is_flag = field == "additional_data"
        wanted = f"{'true or false' if is_flag else 'a text'} in {field}"
        holds = isinstance(claim[field], bool if is_flag else str)
        check(holds, wanted, claim=name, **{field: claim[field]})
    said = claim["name"] and claim["architecture"]
    check(bool(said), "a name and an architecture", claim=name)
    found["samrobust"]["evidence"] = origin["evidence"]
    for field, value in found.items():
        wanted = f"{field}={value} as in {origin['evidence']}"
        check(claim[field] == value, wanted, claim=name, **{field: claim[field]})


def _digest(content: bytes) -> str:
    """Returns the digest that evidence is named by."""
    return hashlib.sha256(content).hexdigest()[:16]


def _read_table(path: pathlib.Path) -> tuple[Table, bytes]:
    """Reads a table that a claim may rest on, and the bytes of its file."""
    wanted, fix = "the autoattack.json of `samrobust recheck`", "Run it first."
    check(path.is_file(), wanted, fix, path=str(path))
    content = path.read_bytes()
    table = from_json(content.decode())
    wanted = "the standard AutoAttack, in float32 and on test images"
    fix = "Run `samrobust recheck --version=standard --dtype=float32` on test images."
    is_standard = bool(_STANDARD.fullmatch(table.caption))
    check(is_standard, wanted, fix, path=str(path), caption=table.caption)
    return table, content


def _measured(table: Table, row: str, seed: int, radius: Any) -> Claim:
    """Returns the fields that a measurement decides.

    Raises:
      ValueError: if the table has no such run or radius, or does not say which network
        was measured, on which images and how.
    """
    check(radius in _RADII, f"eps in {list(_RADII)}", eps=radius)
    column = f"linf {radius} AA"
    check(column in table.columns, f"a column {column}", columns=list(table.columns))
    runs = [run for run in table.runs if (run["row"], run["seed"]) == (row, seed)]
    check(len(runs) == 1, "a run of the table", row=row, seed=seed)
    (run,) = runs
    named = {key: run.get(key) for key in ("identity", "step", "images")}
    by_column = makers(run)
    made = by_column.get(column, by_column[""])
    named |= {key: made.get(key) for key in ("commit", "device", "command")}
    from samrobust.attacks import ATTACKS_VERSION  # JAX is slow to load

    version = attacks_version(run)
    wanted = f"attacks of version {ATTACKS_VERSION}, as today's"
    fix = "Run `samrobust recheck` again."
    check(version == ATTACKS_VERSION, wanted, fix, attacks_version=version)
    lacking = [key for key, value in named.items() if value is None]
    fix = "Run `samrobust recheck` again: this version records it."
    check(not lacking, "a measurement that names its network", fix, lacking=lacking)
    cells = next(r for r in table.rows if r.name == row)
    number = cells.seeds.index(seed)
    natural, robust = (cells.cells[c].values[number] for c in ("natural", column))
    return {
        "number_forward_passes": 1,
        "dataset": table.dataset,
        "eps": radius,
        "clean_acc": f"{natural:.2f}",
        "autoattack_acc": f"{robust:.2f}",
        "samrobust": {
            **{"norm": "linf", "row": row, "label": cells.label, "seed": seed},
            **{"num_test": table.num_test, **named},
        },
    }


def to_sheet(claims: list[Claim]) -> Sheet:
    """Returns a table for each data set and radius, the most robust first."""

    def board(claim: Claim) -> tuple[str, str]:
        return claim["dataset"], claim["eps"]

    header = ("model", "architecture", "images", "natural", "AutoAttack", "run")
    tables = []
    for (dataset, radius), group in itertools.groupby(sorted(claims, key=board), board):
        ranked = sorted(group, key=lambda c: (-float(c["autoattack_acc"]), c["name"]))
        rows = [
            (
                *(c["name"], c["architecture"], f"{c['samrobust']['num_test']:,}"),
                *(c["clean_acc"], c["autoattack_acc"], c["samrobust"]["identity"]),
            )
            for c in ranked
        ]
        tables.append(TextTable(header, rows, f"{dataset}, linf {radius}", words=2))
    errors = [
        standard_error(float(claim[column]), claim["samrobust"]["num_test"])
        for claim in claims
        for column in ("clean_acc", "autoattack_acc")
    ]
    notes = [
        "Accuracy in %, one network a line; the standard AutoAttack in float32 on as "
        "many test images as the column says, which leave up to "
        f"±{max(errors):.2g} points (one standard error).",
        *dict.fromkeys(claim["footnote"] for claim in claims),
    ]
    return Sheet(tables, notes)
