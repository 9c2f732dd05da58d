"""The files of a run: whole or not at all."""

import json

import helpers
import pytest

from samrobust.files import glance, read_json_lines, temporary_beside
from samrobust.workdir import (
    MetricsLog,
    WorkdirError,
    append_json_line,
    read_json,
    settle_config,
    write_json,
    write_text,
)


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


def test_lines_are_read_up_to_the_one_that_was_cut_off(tmp_path):
    path = tmp_path / "x.jsonl"
    assert read_json_lines(path) == []
    path.write_bytes(b'{"a": 1}\n{"a": "\xc3')
    assert read_json_lines(path) == [{"a": 1}]


def test_lines_are_appended(tmp_path):
    for i in range(3):
        append_json_line(tmp_path / "x.jsonl", {"i": i})
    assert helpers.read_lines(tmp_path / "x.jsonl") == [{"i": i} for i in range(3)]


# The config.


def test_a_config_settles_and_stays(tmp_path):
    config = {"seed": 0, "training": {"epochs": 2, "milestones": (0.5, 0.75)}}
    settle_config(tmp_path, config)
    settle_config(tmp_path, config)  # tuples are lists in JSON: no difference
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1, "a": {"b": 2}}, r"seed was 0, is 1\."),
        ({"seed": 0, "a": {"b": 3}}, r"a\.b was 2, is 3\."),
        ({"seed": 0, "a": {}}, r"a\.b was 2, is None\."),
        ({"seed": 1, "a": {"b": 3}}, r"a\.b was 2, is 3; seed was 0, is 1\."),
    ],
)
def test_another_config_is_refused_and_its_fields_are_named(tmp_path, changed, message):
    settle_config(tmp_path, {"seed": 0, "a": {"b": 2}})
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(WorkdirError, match=message):
        settle_config(tmp_path, changed)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_run_of_an_older_version_lacks_the_newest_fields(tmp_path):
    config = json.loads(helpers.make_config().to_json_best_effort())
    older = {**config, "sam": {k: v for k, v in config["sam"].items() if k != "m"}}
    (tmp_path / "config.json").write_text(json.dumps(older))
    settle_config(tmp_path, config)
    (tmp_path / "config.json").write_text(json.dumps(older))
    with pytest.raises(WorkdirError, match=r"sam\.m was 0, is 16"):
        settle_config(tmp_path, {**config, "sam": {**config["sam"], "m": 16}})


def test_where_data_lie_and_how_often_to_save_may_change(tmp_path):
    def make(value):
        return {
            "data": {"data_dir": value, "manual_dir": value},
            "checkpoint": {"minutes": value, "keep": value},
            "tracking": {"tensorboard": value, "wandb": value},
        }

    settle_config(tmp_path, make(1))
    settle_config(tmp_path, make(2))
    assert read_json(tmp_path / "config.json") == make(2)


def test_the_shipped_fields_that_may_change_exist():
    config = helpers.make_config()
    assert "data_dir" in config.data
    assert "manual_dir" in config.data
    assert "minutes" in config.checkpoint
    assert "wandb" in config.tracking


@pytest.mark.parametrize("content", ["", "{", "[1"])
def test_a_damaged_json_file_is_named_in_the_message(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(Exception, match=r"config\.json"):
        settle_config(tmp_path, {"seed": 0})


# The log.


def test_a_log_keeps_what_lies_before_the_step_it_goes_on_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, last_step=0)
    for step in (4, 8, 12):
        log.append({"step": step})
    resumed = MetricsLog(path, last_step=9)
    assert resumed.lines == [{"step": 4}, {"step": 8}]
    resumed.append({"step": 12, "again": True})
    lines = [{"step": 4}, {"step": 8}, {"step": 12, "again": True}]
    assert helpers.read_lines(path) == resumed.lines == lines


@pytest.mark.parametrize("cut", ['{"step": 8', "{", '{"step": 8, "loss":\n'])
def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4}\n' + cut)
    log = MetricsLog(path, last_step=100)
    assert log.lines == [{"step": 4}]
    log.append({"step": 8})
    assert helpers.read_lines(path) == [{"step": 4}, {"step": 8}]
