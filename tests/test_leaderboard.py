"""Claims in RobustBench's format say what was measured, and nothing else."""

import json
from pathlib import Path

import helpers
import pytest

from samrobust.experiments.leaderboard import add_claims, read_claims, to_sheet
from samrobust.experiments.reporting import summarize
from samrobust.experiments.reporting.notes import notes
from samrobust.experiments.reporting.render import from_json, to_json
from samrobust.system.files import WorkdirError

MADE = {"commit": "abc", "device": "CPU", "command": "samrobust recheck"}
CAPTION = (
    "digits, test images, last checkpoint, float32. AA: AutoAttack, standard; the "
    "columns beside it: PGD-10 on the cross_entropy loss, final iterate judged."
)
ROWS = [("st", "ST"), ("sam,rho=0.2", "SAM (rho = 0.2)")]
AT = "2/255"


def recheck(folder: Path, caption: str = CAPTION, **changes) -> Path:
    """A folder as `samrobust recheck` leaves it, of one seed."""
    runs = [
        {
            "dataset": "digits",
            "row": row,
            "seed": 0,
            "num_test": 400,
            "identity": f"identity-{row}",
            "step": 9,
            "images": "of-these",
            "accuracy": {"natural": 90.0, f"linf {AT}": 70.0, f"linf {AT} AA": robust},
            "provenance": MADE,
        }
        | changes
        for (row, _), robust in zip(ROWS, (50.0, 60.25), strict=True)
    ]
    table = summarize(runs, rows=ROWS, caption=caption)
    folder.mkdir(exist_ok=True)
    (folder / "autoattack.json").write_text(to_json(table))
    return folder


@pytest.fixture
def board(tmp_path) -> Path:
    """A leaderboard of two claims."""
    add_claims(tmp_path / "board", recheck(tmp_path / "digits"), "A CNN", "Reduced.")
    return tmp_path / "board"


def place(board: Path, row: str) -> Path:
    """Where the claim of a row is."""
    return board / "digits" / "linf-2-255" / f"{row}-seed0-identity-{row}.json"


def test_a_claim_has_robustbenchs_fields_and_names_what_it_rests_on(board):
    path = place(board, "sam,rho=0.2")
    claim = json.loads(path.read_text())
    numbers = (claim["eps"], claim["clean_acc"], claim["autoattack_acc"])
    assert numbers == ("2/255", "90.00", "60.25")
    assert claim["footnote"] == "samrobust's AutoAttack on 400 test images. Reduced."
    origin = claim["samrobust"]
    assert (board / origin["evidence"]).is_file()
    assert (origin["identity"], origin["step"]) == ("identity-sam,rho=0.2", 9)
    assert origin.items() >= MADE.items()


def test_a_claim_rests_on_the_process_that_made_its_column(tmp_path):
    earlier = MADE | {"commit": "earlier"}
    made_by = {f"linf {AT} AA": earlier}
    folder = recheck(tmp_path / "digits", column_provenance=made_by)
    add_claims(tmp_path / "board", folder, "A CNN")
    claim = json.loads(place(tmp_path / "board", "st").read_text())
    assert claim["samrobust"].items() >= earlier.items()


def test_what_was_filled_in_by_hand_stays_and_other_networks_stand_beside(board):
    path, again = place(board, "st"), board.parent / "digits"
    claim = json.loads(path.read_text()) | {"authors": "A. Author", "link": "a.org"}
    path.write_text(json.dumps(claim))
    add_claims(board, again, "A wide CNN")
    added = json.loads(path.read_text())
    assert (added["authors"], added["link"]) == ("A. Author", "a.org")
    assert added["architecture"] == "A wide CNN"
    add_claims(board, recheck(board.parent / "other", identity="another"), "A CNN")
    assert len(read_claims(board)) == 4


def test_a_data_set_with_a_slash_in_its_name_has_a_board(tmp_path):
    name = "imagenet_resized/32x32"
    recheck(tmp_path / "small", dataset=name)
    (tmp_path / "real").mkdir()
    (tmp_path / "board").symlink_to(tmp_path / "real")
    add_claims(tmp_path / "board", tmp_path / "small", "A CNN")
    assert {c["dataset"] for c in read_claims(tmp_path / "board")} == {name}


def test_a_table_that_was_edited_is_no_evidence(board):
    measured = board.parent / "digits" / "autoattack.json"
    (kept,) = (board / "evidence").iterdir()
    for path in (measured, kept):
        path.write_text(path.read_text().replace("50.0", "89.0"))
    with pytest.raises(WorkdirError, match="a damaged file"):
        add_claims(board, measured.parent, "A CNN")
    with pytest.raises(WorkdirError, match="a damaged file"):
        read_claims(board)


def test_evidence_that_was_edited_is_refused_without_its_checksum_too(board):
    (kept,) = (board / "evidence").iterdir()
    content = json.loads(kept.read_text().replace("50.0", "89.0"))
    del content["checksum"]
    kept.write_text(json.dumps(content))
    path = place(board, "st")
    path.write_text(path.read_text().replace('"50.00"', '"89.00"'))
    with pytest.raises(ValueError, match="evidence as it was added"):
        read_claims(board)


def test_a_claim_outlives_the_table_that_it_was_made_of(board, tmp_path):
    claims = read_claims(board)
    recheck(tmp_path / "digits", accuracy={"natural": 9.0, "linf 8/255 AA": 1.0})
    (tmp_path / "elsewhere").mkdir()
    moved = board.rename(tmp_path / "elsewhere" / "board")
    assert read_claims(moved) == claims


def test_the_most_robust_comes_first(board):
    assert helpers.main("leaderboard", f"--workdir={board}") == 0
    text = (board / "leaderboard.md").read_text()
    assert text == to_sheet(read_claims(board)).to_markdown()
    first, second = [line for line in text.splitlines() if "A CNN" in line]
    assert first.startswith("| SAM (rho = 0.2), seed 0 | A CNN | 400 | 90.00 | 60.25 |")
    assert second.startswith("| ST, seed 0 | A CNN | 400 | 90.00 | 50.00 |")
    assert "±2.5 points" in text  # 100 sqrt(0.5 * 0.5 / 400)


@pytest.mark.parametrize(
    ("natural", "robust", "error"),
    [(100.0, 0.0, "0.18"), (60.0, 2.0, "2.4")],  # 100 sqrt(0.6 * 0.4 / 400)
)
def test_the_sampling_error_is_that_of_a_tables_cells(natural, robust, error, tmp_path):
    accuracy = {"natural": natural, f"linf {AT} AA": robust}
    rechecked = recheck(tmp_path / "digits", accuracy=accuracy)
    add_claims(tmp_path / "board", rechecked, "A CNN")
    said = f"leave up to ±{error} points (one standard error)"
    assert said in to_sheet(read_claims(tmp_path / "board")).notes[0]
    table = from_json((rechecked / "autoattack.json").read_text())
    assert said in " ".join(notes(table))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"autoattack_acc": "60.00"}, "autoattack_acc=50.00 as in .*'60.00'"),
        ({"clean_acc": "99.00"}, "clean_acc=90.00 as in .*'99.00'"),
        ({"dataset": "cifar10"}, "dataset=digits as in .*'cifar10'"),
        ({"eps": "8/255"}, r"eps in \['1/255', '2/255'\], got eps='8/255'"),
        ({"eps": "1/255"}, "a column linf 1/255 AA, got columns="),
        ({"samrobust.num_test": 500}, "samrobust=.*'num_test': 400.*as in"),
        ({"samrobust.identity": "another"}, "samrobust=.*as in .*another"),
        ({"samrobust.seed": 1}, "a run of the table, got row='st', seed=1"),
        ({"samrobust.evidence": "none.json"}, "the autoattack.json of .*none.json"),
        ({"unreliable": True}, r"RobustBench's fields.*more=\['unreliable'\]"),
        ({"venue": None}, "a text in venue"),
        ({"name": ""}, "a name and an architecture"),
        ({"number_forward_passes": 3}, "number_forward_passes=1"),
        ({"additional_data": "no"}, "true or false in additional_data.*'no'"),
    ],
)
def test_a_claim_of_anything_else_is_refused(board, change, message):
    path = place(board, "st")
    claim = json.loads(path.read_text())
    for name, value in change.items():
        section, _, field = name.rpartition(".")
        (claim[section] if section else claim)[field] = value
    path.write_text(json.dumps(claim))
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        read_claims(board)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption": CAPTION.replace("standard", "custom (square)")}, "the standard"),
        ({"caption": CAPTION.replace("float32", "bfloat16")}, "in float32"),
        ({"caption": CAPTION.replace("test im", "validation im")}, "on test images"),
        ({"attacks_version": 1}, "attacks of version .* got attacks_version=1"),
        ({"identity": None}, r"names its network, got lacking=\['identity'\]"),
        ({"provenance": {}}, r"names its network, .*'commit', 'device', 'command'"),
        ({"accuracy": {"natural": 9.0, "linf 8/255 AA": 1.0}}, "at l-inf 1/255 or 2"),
    ],
)
def test_what_is_no_evidence_is_refused(tmp_path, options, message):
    folder = recheck(tmp_path / "digits", **options)
    with pytest.raises(ValueError, match=f"^Expected .*{message}"):
        add_claims(tmp_path / "board", folder, "A CNN")


def test_flags_that_do_not_go_together_are_refused(board, capsys):
    assert helpers.main("leaderboard", f"--workdir={board}", "--architecture=A") == 2
    assert "--add with --architecture" in capsys.readouterr().err
    assert helpers.main("leaderboard", f"--workdir={board / 'none'}") == 2
    assert "Expected claims in --workdir" in capsys.readouterr().err
