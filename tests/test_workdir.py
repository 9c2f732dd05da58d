"""The files of a run: whole or not at all."""

import concurrent.futures
import errno
import fcntl
import json
import os
import threading

import helpers
import pytest

from samrobust.experiments.identity import identity_of
from samrobust.experiments.rows import parse_row
from samrobust.experiments.workdir import (
    OtherConfigError,
    add_evaluation,
    config_of_run,
    finished_runs,
    read_result,
    run_folder,
    settle_config,
)
from samrobust.system.claims.lease import ClaimedError
from samrobust.system.files import (
    WorkdirError,
    append_json_line,
    check_writable,
    glance,
    read_json,
    read_json_lines,
    read_object,
    read_sealed,
    write_json,
    write_sealed,
    write_text,
)
from samrobust.system.storage import temporary_beside


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_json_file_comes_back(tmp_path):
    value = {"a": [1, 2.5, None], "b": "\u00e9"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert names(tmp_path) == ["x.json"]


def test_an_absent_json_file_is_none(tmp_path):
    assert read_json(tmp_path / "x.json") is None


def test_json_that_others_cannot_read_is_never_written(tmp_path):
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_json_line(tmp_path / "x.jsonl", {"loss": float("nan")})
    assert read_json(tmp_path / "x.json") == 1


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    write_text(path, "old")

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_processes_of_the_same_number_do_not_write_the_same_temporary_file(tmp_path):
    path = tmp_path / "x.txt"
    assert temporary_beside(path) != temporary_beside(path)


@pytest.mark.parametrize("content", ["", "{", "[1]", None])
def test_a_glance_at_a_damaged_or_absent_file_sees_nothing(tmp_path, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert glance(path) == {}
    assert glance(tmp_path) == {}


# What no JSON file of a run may look like.
DAMAGED = ["", "{", "[1", "\x00", "[]", "3", "null", "NaN", '"text"', "[" * 100_000]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda text: text[:6])
def test_a_file_without_an_object_is_refused_by_name(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    for read in (read_object, read_sealed):
        with pytest.raises(WorkdirError, match=r"x\.json, got a damaged file") as error:
            read(path)
        assert "\n" not in str(error.value)


def test_a_folder_in_the_place_of_a_json_file_is_refused(tmp_path):
    with pytest.raises(WorkdirError, match="got a damaged file"):
        read_json(tmp_path)
    with pytest.raises(WorkdirError, match="got a folder"):
        write_json(tmp_path, {})


def test_whether_a_folder_can_be_written_leaves_nothing_there(tmp_path):
    left = temporary_beside(tmp_path / "config.json")
    left.touch()
    os.utime(left, (0, 0))  # by a process that was killed long ago
    check_writable(tmp_path, "evaluations.jsonl")
    assert names(tmp_path) == []
    (tmp_path / "evaluations.jsonl").mkdir()
    with pytest.raises(WorkdirError, match="Expected a writable directory"):
        check_writable(tmp_path, "evaluations.jsonl")


def test_a_sealed_file_comes_back_and_any_changed_character_is_noticed(tmp_path):
    path, value = tmp_path / "x.json", {"accuracy": {"natural": 97.25}, "seed": 3}
    write_sealed(path, value)
    assert read_sealed(path) == value
    write_json(path, dict(reversed(json.loads(path.read_text()).items())))
    assert read_sealed(path) == value
    text = path.read_text()
    for index, character in enumerate(text):
        other = "1" if character == "2" else "2"
        path.write_text(text[:index] + other + text[index + 1 :])
        if character.strip():  # white space between the tokens says nothing
            with pytest.raises(WorkdirError, match="got a damaged file"):
                read_sealed(path)


def test_a_file_that_is_not_sealed_is_refused_where_a_sealed_one_is_read(tmp_path):
    write_json(tmp_path / "x.json", {"accuracy": 97.25})
    with pytest.raises(WorkdirError, match="its checksum is none"):
        read_sealed(tmp_path / "x.json")


def test_lines_that_hold_no_object_are_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    assert read_json_lines(path) == []
    path.write_bytes(b'{"a": 1}\n{"a": \n[]\n\n{"b": 2}\n{"a": "\xc3')
    assert read_json_lines(path) == [{"a": 1}, {"b": 2}]
    with pytest.raises(WorkdirError, match="see line 2"):
        read_json_lines(path, whole=True)
    path.write_bytes(b'{"a": 1}\n{"b": ')  # a kill may cut the last one off
    assert read_json_lines(path, whole=True) == [{"a": 1}]


@pytest.mark.parametrize("locks", [True, False])  # a file server may have none
def test_lines_are_appended(locks, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if not locks:
        monkeypatch.setattr("samrobust.system.storage.fcntl.flock", refuse)
    for i in range(3):
        append_json_line(tmp_path / "x.jsonl", {"i": i})
    assert helpers.read_lines(tmp_path / "x.jsonl") == [{"i": i} for i in range(3)]


@pytest.mark.parametrize("cut", [0, 1, 5, 8])
def test_a_line_that_was_cut_off_swallows_none_that_follows(tmp_path, cut):
    path = tmp_path / "x.jsonl"
    path.write_text('{"i": 0}\n' + '{"i": 1}'[:cut])
    append_json_line(path, {"i": 2})
    whole = [{"i": 1}] if cut == 8 else []
    assert read_json_lines(path) == [{"i": 0}, *whole, {"i": 2}]


# The config.


def test_a_config_settles_and_stays(tmp_path):
    config = helpers.make_config("st", {"training.milestones": (0.5, 0.75)})
    settle_config(tmp_path, config)
    settle_config(tmp_path, config)  # tuples are lists in JSON: no difference
    assert config_of_run(tmp_path).training.milestones == [0.5, 0.75]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, r"seed was 0, is 1\."),
        ({"sam.batch_stats": "first"}, r"sam\.batch_stats was 'both', is 'first'\."),
        ({"data.validation_size": 9}, r"data\.validation_size was 0, is 9\."),
        ({"data.name": "b/own.npz"}, r"data\.name was 'digits', is 'b/own\.npz'\."),
        ({"seed": 1, "data.padding": 3}, r"data\.padding .*; seed was 0, is 1\."),
    ],
)
def test_another_config_is_refused_and_its_fields_are_named(tmp_path, changed, message):
    settle_config(tmp_path, helpers.make_config())
    (tmp_path / "metrics.jsonl").touch()
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(WorkdirError, match=message):
        settle_config(tmp_path, helpers.make_config("st", changed))
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_run_of_an_older_version_lacks_the_newest_fields(tmp_path):
    config = helpers.make_config("sam,rho=0.2")
    older = json.loads(config.to_json_best_effort())
    del older["sam"]["m"]
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.json").write_text(json.dumps(older))
    settle_config(tmp_path, config)
    (tmp_path / "config.json").write_text(json.dumps(older))
    groups = {"sam.m": 16, "model.batch_norm_group": 16}
    with pytest.raises(WorkdirError, match=r"sam\.m was 0, is 16"):
        settle_config(tmp_path, helpers.make_config("sam,rho=0.2", groups))


def test_what_changes_no_result_may_change(tmp_path):
    changed = {
        "data.data_dir": "elsewhere",
        "data.manual_dir": "there",
        "checkpoint.minutes": 1.0,
        "checkpoint.keep": 7,
        "tracking.tensorboard": True,
        "training.steps_per_call": 3,
        "evaluation.batch_size": 7,
    }
    settle_config(tmp_path, helpers.make_config())
    settle_config(tmp_path, helpers.make_config("st", changed))
    assert config_of_run(tmp_path).training.steps_per_call == 3


@pytest.mark.parametrize(
    "name",
    [
        *("result.json", "metrics.jsonl", "checkpoints/"),
        *("evaluations.jsonl", "autoattack/"),
    ],
)
def test_what_a_run_left_without_a_config_is_nobody_elses(tmp_path, name):
    if name.endswith("/"):
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).touch()
    with pytest.raises(WorkdirError, match=f"config.json beside {name.strip('/')} in"):
        settle_config(tmp_path, helpers.make_config())
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("content", DAMAGED, ids=lambda text: text[:6])
def test_a_damaged_config_is_named_in_the_message(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for read in (config_of_run, lambda w: settle_config(w, helpers.make_config())):
        with pytest.raises(WorkdirError, match=r"config\.json"):
            read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *({"training": 3}, {"training": None}, {"seed": "x"}, {"seed": -1}),
        *({"evaluation": {"linf": 3}}, {"model": {"blocks": {}}}),
    ],
    ids=json.dumps,
)
def test_a_config_that_is_none_of_ours_is_refused_in_one_line(tmp_path, content):
    stored = json.loads(helpers.make_config().to_json_best_effort())
    (tmp_path / "config.json").write_text(json.dumps(stored | content))
    with pytest.raises(WorkdirError, match=r"config\.json") as error:
        config_of_run(tmp_path)
    assert "\n" not in str(error.value)


def make_finished(workdir, *names, **fields):
    """Directories of finished runs, as far as a table looks at them."""
    for name in names:
        row, _, seed = name.partition("/seed")
        folder = helpers.make_folder(workdir / name)
        overrides = {"seed": int(seed.split(".")[0]), **fields}
        settle_config(folder, helpers.make_config(row, overrides))
        (folder / "result.json").write_text("{}")


def test_an_evaluation_of_a_run_that_was_moved_makes_no_new_folder(tmp_path):
    with pytest.raises(ClaimedError, match="the directory was removed or moved"):
        add_evaluation(tmp_path / "gone", {"accuracy": {}})
    assert not (tmp_path / "gone").exists()


def test_lines_are_added_by_one_process_at_a_time(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"n": 1}\n{"n": ')
    asked, lock = threading.Event(), fcntl.flock

    def telling(file, kind):
        asked.set()
        lock(file, kind)

    with path.open("ab") as other, concurrent.futures.ThreadPoolExecutor() as pool:
        lock(other, fcntl.LOCK_EX)
        monkeypatch.setattr("samrobust.system.storage.fcntl.flock", telling)
        added = pool.submit(append_json_line, path, {"n": 3})
        assert asked.wait(60)
        other.write(b"2}\n")
        other.flush()
        lock(other, fcntl.LOCK_UN)
        added.result()
    assert read_json_lines(path) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_copies_of_runs_are_no_runs_of_a_table(tmp_path):
    make_finished(tmp_path, "st/seed0", "st/seed1", "st/seed0.bak")
    with pytest.warns(
        UserWarning, match=r"Left out, .* their folders: st/seed0\.bak\."
    ):
        assert list(finished_runs(tmp_path)) == ["st/seed0", "st/seed1"]


def test_seeds_of_a_row_that_were_trained_otherwise_make_no_table(tmp_path):
    make_finished(tmp_path, "st/seed0", "sam,rho=0.2/seed1", **{"training.epochs": 3})
    make_finished(tmp_path, "st/seed1", **{"training.epochs": 9})
    wanted = r"one row that were trained alike, as st/seed0, got run='st/seed1', "
    with pytest.raises(ValueError, match=wanted + r"training\.epochs=\(3, 9\)"):
        finished_runs(tmp_path)
    assert list(finished_runs(tmp_path, ["sam,rho=0.2"])) == ["sam,rho=0.2/seed1"]


def test_what_rows_differ_in_beyond_their_names_is_said(tmp_path):
    make_finished(tmp_path, "st/seed0", "st/seed1", **{"training.epochs": 3})
    make_finished(tmp_path, "st,training.epochs=6/seed0", **{"model.width": 4})
    make_finished(tmp_path, "sam,rho=0.2/seed0", **{"training.epochs": 3})
    told = r"^The rows differ in more than they say\. model\.width: \[2, 4\]\.$"
    with pytest.warns(UserWarning, match=told):
        assert len(finished_runs(tmp_path)) == 4
    fields = {"training.epochs": 3, "model.blocks": (1, 2)}
    make_finished(tmp_path, "sam,rho=0.1/seed0", **fields)
    with pytest.warns(UserWarning, match=r"model\.blocks: \[\[1, 2\], \[1\]\]"):
        finished_runs(tmp_path, ["st", "sam,rho=0.1"])
    make_finished(tmp_path, "sam,rho=0.4/seed0", **{"training.epochs": 9})
    with pytest.warns(UserWarning, match=r"training\.epochs: \[3, 9\]"):
        assert len(finished_runs(tmp_path)) == 6  # although one row names the field


def test_runs_that_are_judged_otherwise_make_no_table(tmp_path):
    make_finished(tmp_path, "st/seed0", "st/seed1", **{"training.epochs": 3})
    make_finished(tmp_path, "sam,rho=0.2/seed0", **{"training.epochs": 9})
    with pytest.warns(UserWarning, match=r"training\.epochs: \[9, 3\]"):
        assert len(finished_runs(tmp_path)) == 3  # a row may train longer
    make_finished(tmp_path, "sam,rho=0.4/seed0", **{"evaluation.num_steps": 7})
    with pytest.raises(ValueError, match=r"judged alike, .*evaluation\.num_steps"):
        finished_runs(tmp_path)
    with pytest.warns(UserWarning, match=r"training\.epochs: \[9, 3\]"):
        assert len(finished_runs(tmp_path, ["st;sam,rho=0.2"])) == 3


def test_runs_that_were_judged_in_batches_of_other_sizes_make_a_table(tmp_path):
    make_finished(tmp_path, "st/seed0", **{"evaluation.batch_size": 500})
    others = {"evaluation.batch_size": 250}
    make_finished(tmp_path, "st/seed1", "sam,rho=0.2/seed0", **others)
    configs = finished_runs(tmp_path)
    sizes = {name: config.evaluation.batch_size for name, config in configs.items()}
    assert sizes == {"sam,rho=0.2/seed0": 250, "st/seed0": 500, "st/seed1": 250}


def test_rows_without_a_finished_run_are_named_and_others_need_not_be_whole(tmp_path):
    make_finished(tmp_path, "st/seed0", "sam,rho=0.2/seed0")
    (tmp_path / "sam,rho=0.2" / "seed0" / "config.json").write_text("{")
    assert list(finished_runs(tmp_path, ["st"])) == ["st/seed0"]
    with pytest.raises(ValueError, match=r"of all --rows, .*sam,rho=0\.4"):
        finished_runs(tmp_path, ["st", "sam,rho=0.4"])


def test_runs_in_directories_that_an_older_version_named_are_found(tmp_path):
    older = "at+sam,norm=linf,eps=16,rho=0.1"
    row = parse_row("at,norm=linf,eps=16+sam,rho=0.1").name
    folder = helpers.make_folder(tmp_path / older / "seed0")
    config = helpers.make_config(row, {"seed": 0})
    stored = {**json.loads(config.to_json_best_effort()), "row": older}
    write_json(folder / "config.json", stored)
    whose = identity_of(config, None)
    write_sealed(folder / "result.json", {"row": older, "run": whose.as_dict()})
    assert list(finished_runs(tmp_path)) == [f"{older}/seed0"]
    assert list(finished_runs(tmp_path, [row])) == [f"{older}/seed0"]
    assert list(finished_runs(tmp_path, [older])) == [f"{older}/seed0"]
    assert run_folder(tmp_path, row, 0) == folder
    assert run_folder(tmp_path, row, 1) == tmp_path / row / "seed1"
    assert (read_result(folder, whose) or {})["row"] == row


def test_a_config_that_no_run_has_left_anything_beside_may_be_another(tmp_path):
    """As after a wrong batch size, which is refused before it trains."""
    settle_config(tmp_path, helpers.make_config("st"))
    settle_config(tmp_path, config := helpers.make_config("sam,rho=0.2"))
    (tmp_path / "metrics.jsonl").touch()
    settle_config(tmp_path, config)
    with pytest.raises(OtherConfigError, match=r"row was 'sam,rho=0\.2', is"):
        settle_config(tmp_path, helpers.make_config("st"))


def test_the_directory_of_a_table_is_not_that_of_a_run(tmp_path):
    write_json(tmp_path / "plan.json", {"runs": []})
    with pytest.raises(WorkdirError, match="got that of a table"):
        settle_config(tmp_path, helpers.make_config())
