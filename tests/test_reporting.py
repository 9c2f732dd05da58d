"""Tables and plots: numbers by hand, files that parse, pictures that exist."""

import csv
import io
import itertools
import json
import math
import os
import statistics
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from samrobust.experiments.reporting.names import family, short_label
from samrobust.experiments.reporting.notes import notes, sampling_error
from samrobust.experiments.reporting.pictures import draw_table, write_figure
from samrobust.experiments.reporting.prices import draw_prices, has_prices
from samrobust.experiments.reporting.render import (
    from_json,
    to_csv,
    to_json,
    to_markdown,
    to_rich,
    write_table,
)
from samrobust.experiments.reporting.table import Difference, summarize
from samrobust.system.tables import Sheet, TextTable

ROWS = [
    ("st", "ST"),
    ("sam,rho=0.2", "SAM (rho = 0.2)"),
    ("sam,rho=0.4", "SAM (rho = 0.4)"),
    ("at,norm=linf,eps=8", "AT (linf, eps = 8/255)"),
    ("at,norm=l2,eps=128", "AT (l2, eps = 128/255)"),
]
COLUMNS = ["natural", "linf 1/255", "linf 2/255", "l2 16/255", "l2 32/255"]
ACCURACIES = {  # the paper's Table 2
    "st": (94.6, 39.6, 8.9, 76.1, 51.7),
    "sam,rho=0.2": (95.5, 48.9, 10.2, 82.9, 58.8),
    "sam,rho=0.4": (94.7, 56.1, 15.6, 84.0, 64.4),
    "at,norm=linf,eps=8": (84.2, 81.5, 78.4, 82.5, 80.8),
    "at,norm=l2,eps=128": (90.2, 85.7, 78.4, 89.6, 87.1),
}
PAPER = {
    row: dict(zip(COLUMNS, values, strict=True)) for row, values in ACCURACIES.items()
}
SECONDS = {"st": 0.01, "sam": 0.02, "at": 0.11}
SHIFTS = (0.5, -0.25, 0.125)  # of a seed, the same in all rows and columns


def run(row, seed=0, accuracy=None, **changes):
    values = {c: v + SHIFTS[seed % 3] for c, v in PAPER[row].items()}
    result = {
        "dataset": "cifar10",
        "row": row,
        "label": dict(ROWS)[row],
        "seed": seed,
        "accuracy": accuracy or values,
        "training_seconds": 512.3,
        "step_seconds": SECONDS[row.split(",")[0]],
        "num_test": 10000,
        "provenance": {"commit": "abc123", "jax": "0.10.0", "device": "CPU"},
    }
    return result | changes


def natural_runs(row, *accuracies, **changes):
    """Runs of seeds 0, 1, ... that measured the natural accuracy only."""
    return [run(row, i, {"natural": a}, **changes) for i, a in enumerate(accuracies)]


def grid(seeds=3, rows=ROWS, **options):
    results = [run(name, seed) for name, _ in rows for seed in range(seeds)]
    return summarize(results, rows=ROWS, **options)


def printed(table, width, **options):
    out = io.StringIO()
    Console(file=out, width=width, **options).print(to_rich(table))
    return out.getvalue()


def difference(table, row, column="natural"):
    found = table.rows[row].cells[column].difference
    assert found is not None
    return found


def line(text, start):
    return next(part for part in text.splitlines() if part.startswith(start))


def test_the_baseline_is_st_wherever_it_stands_or_is_named():
    long = "st,training.epochs=40", "ST with epochs 40"
    results = [run(row, seed) for row, _ in ROWS[:2] for seed in range(2)]
    results += [r | {"row": long[0], "step_seconds": 0.04} for r in results[:2]]
    table = summarize(results, rows=[long, *ROWS[:2]])
    assert [row.cost for row in table.rows] == [4.0, 1.0, 2.0]
    text = to_markdown(summarize(results[2:], rows=[long, ROWS[1]]))
    assert "seconds of training, ST with epochs 40 = 1" in text
    assert "Difference to ST with epochs 40 in points" in text


class TestSummarise:
    def test_mean_and_std_are_those_of_the_statistics_module(self):
        values = [99.2, 98.6, 99.6, 97.0]
        fourth = run("st", 0, {"natural": values[3]}) | {"seed": 3}
        results = [*natural_runs("st", *values[:3]), fourth]
        cell = summarize(results, rows=ROWS).rows[0].cells["natural"]
        assert cell.values == tuple(values)
        assert cell.mean == pytest.approx(statistics.mean(values), abs=1e-12)
        assert cell.std == pytest.approx(statistics.stdev(values), abs=1e-12)

    def test_one_seed_has_no_std(self):
        cell = grid(seeds=1).rows[0].cells["natural"]
        assert cell.mean == 95.1
        assert cell.std is None

    def test_columns_are_natural_then_linf_then_l2_by_radius(self):
        names = ["l2 128/255", "linf 16/255", "l2 64/255", "natural", "linf 8/255"]
        accuracy = dict.fromkeys(names, 50.0)
        table = summarize([run("st", accuracy=accuracy)], rows=ROWS)
        expected = ("natural", "linf 8/255", "linf 16/255", "l2 64/255", "l2 128/255")
        assert table.columns == expected

    def test_the_order_of_the_results_does_not_matter(self):
        results = [run(name, seed) for name, _ in ROWS for seed in range(3)]
        table = summarize(results, rows=ROWS)
        assert summarize(results[::-1], rows=ROWS) == table

    def test_rows_without_results_are_missing_and_keep_their_place(self):
        table = grid(rows=[ROWS[0], ROWS[2]])
        assert [row.name for row in table.rows] == [name for name, _ in ROWS]
        expected = ["sam,rho=0.2", "at,norm=linf,eps=8", "at,norm=l2,eps=128"]
        assert [row.name for row in table.missing] == expected
        cell = table.rows[1].cells["natural"]
        assert (cell.values, cell.mean, cell.std) == ((), None, None)

    def test_cost_is_the_median_ratio_of_step_seconds_to_st(self):
        assert [row.cost for row in grid().rows] == pytest.approx([1, 2, 2, 11, 11])

    def test_cost_is_of_the_whole_training(self):
        runs = [run("st", training_steps=100), run("sam,rho=0.2", training_steps=300)]
        assert summarize(runs, rows=ROWS).rows[1].cost == pytest.approx(6)

    def test_cost_does_not_depend_on_where_the_best_checkpoint_lies(self):
        runs = [
            run(row, step=step, training_steps=300)
            for row, step in (("st", 100), ("sam,rho=0.2", 300))
        ]
        table = summarize(runs, rows=ROWS)
        assert table.rows[1].cost == pytest.approx(2)
        assert from_json(to_json(table)) == table

    def test_passes_are_relative_to_st_and_shown_beside_the_cost(self):
        table = grid(passes={"st": 20, "sam,rho=0.2": 40, "at,norm=linf,eps=8": 153.4})
        counted = [row.passes for row in table.rows]
        assert counted == [1, 2, None, pytest.approx(7.67), None]
        text = to_markdown(table)
        assert line(text, "| SAM (rho = 0.2").endswith("| 2.00x | 2.0x |")
        assert line(text, "| AT (l2").endswith("| - | 11.0x |")
        assert "passes: forward and backward passes of training, counted" in text
        assert "passes" not in printed(table, 80)

    @pytest.mark.parametrize(
        ("st", "sam", "shown"),
        [
            ([1, 1, 1, 1, 1], [2, 2, 2, 2, 90], "2.0x"),  # one outlier moves nothing
            ([1, 1, 1, 1, 60], [2, 2, 2, 2, 2], "2.0x"),
            ([1, 2, 1, 2, 1], [2, 4, 2, 4, 2], "2.0x"),  # busy alike: paired by seed
            ([1, 1, 1], [1.8, 2, 2.4], "2.0x ±0.3"),
            ([1, 3, 3], [4.4, 6, 4.2], "-"),  # half of them differ by half
            ([1], [2.04], "2.0x"),
            ([1], [0.9], "-"),  # SAM takes two of ST's steps: the machine was busy
            ([1, 1, 1], [0.8, 0.9, 2], "-"),
        ],
    )
    def test_a_cost_is_not_the_machines_other_work(self, st, sam, shown):
        results = [
            run(row, seed, {"natural": 50.0}, step_seconds=value)
            for row, values in (("st", st), ("sam,rho=0.2", sam))
            for seed, value in enumerate(values)
        ]
        table = summarize(results, rows=ROWS)
        assert [row.shown_cost() for row in table.rows[:2]] == ["1.0x", shown]
        assert f"| {shown} |" in line(to_markdown(table), "| SAM (rho = 0.2)")
        assert shown in " ".join(line(printed(table, 200), "SAM").split())
        assert ("cannot tell" in to_markdown(table)) == (shown == "-")
        how = "one run each" if len(sam) == 1 else "median over seeds"
        assert (how in to_markdown(table)) == (shown != "-" or len(sam) > 1)

    def test_cost_is_over_the_seeds_that_both_have(self):
        results = [run("st"), run("sam,rho=0.2"), run("sam,rho=0.2", 1)]
        results[2]["step_seconds"] = 5.0
        assert summarize(results, rows=ROWS).rows[1].cost == 2.0

    def test_cost_is_unknown_without_st_or_without_step_seconds(self):
        assert {row.cost for row in grid(rows=ROWS[1:]).rows} == {None}
        results = [run("st", step_seconds=None), run("sam,rho=0.2")]
        assert {row.cost for row in summarize(results, rows=ROWS).rows} == {None}

    def test_the_paper_is_beside_its_rows_and_columns_only(self):
        paper = {"sam,rho=0.4": {"natural": 94.7, "linf 8/255": 1.0}, "awp": {}}
        table = grid(paper=paper)
        assert table.has_paper
        assert table.rows[2].cells["natural"].paper == 94.7
        assert table.rows[2].cells["linf 1/255"].paper is None
        assert table.rows[1].cells["natural"].paper is None
        assert not grid().has_paper

    def test_rows_that_tie_in_print_are_all_best(self):
        results = natural_runs("st", 95.01) + natural_runs("sam,rho=0.2", 94.99)
        table = summarize(results, rows=ROWS)
        assert table.best("natural") == {"st", "sam,rho=0.2"}

    def test_a_single_row_is_not_best(self):
        assert grid(rows=ROWS[:1]).best("natural") == frozenset()

    @pytest.mark.parametrize(
        ("results", "message"),
        [
            ([], r"at least one finished run, got results=\[\]"),
            ([{"row": "st"}], r"a result with the key 'dataset', got keys=\['row'\]"),
            ([run("st"), run("st")], "one run a row and seed, got run='st/seed0'"),
            (
                [run("st"), run("st", 1, dataset="digits")],
                r"alike, as st/seed0, got run='st/seed1', dataset=\('digits', 'cifar",
            ),
            (
                [run("st"), run("st", 1, num_test=500)],
                r"alike, as st/seed0, .* num_test=\(500, 10000\)\. Make one table",
            ),
            (
                [run("st"), run("st", 1, attacks_version=3)],
                r"alike, as st/seed0, .* attacks_version=\(3, 2\)\. Make one table",
            ),
            (
                [run("st"), run("st", 1, {"natural": 9.0})],
                r"alike, as st/seed0, .* columns=\(\['natural'\], \['l2 16/255', 'l",
            ),
            ([run("st", accuracy={"natural": math.nan})], "column='natural'"),
            ([run("st", accuracy={"natural": 100.5})], "percentages.* accuracy=100.5"),
            ([run("st", accuracy={"linf 8": 1.0})], "got column='linf 8'. Name it"),
            ([run("st") | {"row": "awp"}], "a row of .* got row='awp'. Add it"),
            ([run("st") | {"accuracy": {}}], "at least one accuracy"),
            ([run("st", step_seconds=math.nan)], "0 < step_seconds < inf, .*=nan"),
        ],
    )
    def test_results_that_make_no_table_are_refused(self, results, message):
        with pytest.raises(ValueError, match=f"^Expected .*{message}"):
            summarize(results, rows=ROWS)

    def test_results_of_before_they_named_the_attacks_stand_beside_those_of_then(self):
        results = [run("st"), run("st", 1, attacks_version=2)]
        (own,) = summarize(results, rows=ROWS[:1]).rows
        assert own.seeds == (0, 1)

    def test_rows_with_one_name_are_refused(self):
        with pytest.raises(ValueError, match="Expected distinct rows, got rows="):
            summarize([run("st")], rows=[*ROWS, ROWS[0]])

    def test_a_paper_number_that_is_no_percentage_is_refused(self):
        with pytest.raises(ValueError, match=r"percentages.*accuracy=nan, paper='st'"):
            grid(paper={"st": {"natural": math.nan}})


class TestComparison:
    def test_the_difference_is_paired_over_the_shared_seeds(self):
        # Seeds 0 and 1 are shared: differences 2 and 5, mean 3.5, std 3 / sqrt(2),
        # standard error 3 / 2.
        results = natural_runs("st", 90.0, 80.0)
        results += natural_runs("sam,rho=0.2", 92.0, 85.0, 10.0)
        found = difference(summarize(results, rows=ROWS), 1)
        assert (found.num_seeds, found.mean) == (2, 3.5)
        assert found.standard_error == pytest.approx(1.5)

    def test_a_common_shift_of_the_seeds_leaves_no_standard_error(self):
        found = difference(grid(), 1, "linf 1/255")
        assert found.mean == pytest.approx(48.9 - 39.6)
        assert found.standard_error == pytest.approx(0, abs=1e-9)

    def test_no_difference_at_all_is_not_significant(self):
        results = natural_runs("st", 90.0, 91.0) + natural_runs("sam,rho=0.2", 90, 91)
        found = difference(summarize(results, rows=ROWS), 1)
        assert (found.mean, found.standard_error, found.p_value) == (0, 0, 1)
        assert found.significant is False

    def test_st_and_rows_without_shared_seeds_have_no_difference(self):
        table = summarize([run("st", 0), run("sam,rho=0.2", 1)], rows=ROWS)
        assert all(row.cells["natural"].difference is None for row in table.rows)
        assert not any("over" in note for note in notes(table))

    def test_the_notes_compare_the_last_sam_row_whatever_its_result(self):
        said = [note for note in notes(grid()) if " - ST over " in note]
        assert len(said) == 3
        assert all(n.startswith("SAM (rho = 0.4) - ST over 3 seeds: ") for n in said)

    def test_a_note_gives_mean_standard_error_and_verdict(self):
        results = natural_runs("st", 90.0, 80.0, 85.0)
        results += natural_runs("sam,rho=0.4", 92.0, 85.0, 86.0)
        # Differences 2, 5, 1: mean 8/3, standard error sqrt(13/3) / sqrt(3) = 1.2.
        assert notes(summarize(results, rows=ROWS))[0] == (
            "SAM (rho = 0.4) - ST over 3 seeds: natural +2.7 ± 1.2 points; "
            "not significant."
        )

    def test_a_note_names_the_columns_that_count(self):
        def runs(row, *pairs):
            names = ("linf 1/255", "linf 2/255")
            accuracies = [dict(zip(names, pair, strict=True)) for pair in pairs]
            return [run(row, i, accuracy) for i, accuracy in enumerate(accuracies)]

        results = runs("st", (50.0, 50.0), (50.0, 50.0))
        results += runs("sam,rho=0.4", (69.0, 49.0), (71.0, 51.0))
        first, second, *_ = notes(summarize(results, rows=ROWS))
        assert first.endswith(
            "linf 1/255 +20.0 ± 1.0, linf 2/255 +0.0 ± 1.0 points; "
            "only linf 1/255 significant."
        )
        assert second == (
            "Differences are paired by seed, ± one standard error; significant: "
            "p < 0.05 in a t-test, 12.7 standard errors with 2 seeds, rounding to "
            "whole images included."
        )

    def test_one_seed_cannot_say(self):
        said = [note for note in notes(grid(seeds=1)) if " - ST over 1 seed: " in note]
        assert len(said) == 3
        assert all("one seed cannot say whether that is chance" in n for n in said)

    def test_the_sampling_error_is_that_of_the_cell_nearest_to_half(self):
        results = natural_runs("st", 90.0, num_test=500)
        results += natural_runs("sam,rho=0.2", 40.0, num_test=500)
        # 100 sqrt(0.4 * 0.6 / 500) = 2.19
        expected = "Sampling error: 500 images leave up to ±2.2 points"
        assert any(n.startswith(expected) for n in notes(summarize(results, rows=ROWS)))

    @pytest.mark.parametrize("num_seeds", [2, 3, 5, 10, 31])
    def test_p_values_are_those_of_a_paired_t_test(self, num_seeds):
        stats = pytest.importorskip("scipy.stats")
        rng = np.random.default_rng(num_seeds)
        pairs = rng.uniform(40, 60, [2, num_seeds])
        results = natural_runs("st", *pairs[0], num_test=10**9)
        results += natural_runs("sam,rho=0.2", *pairs[1], num_test=10**9)
        found = difference(summarize(results, rows=ROWS), 1)
        expected = stats.ttest_rel(pairs[1], pairs[0]).pvalue
        assert found.p_value == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("num_seeds", [2, 3, 5, 31])
    def test_a_difference_is_significant_where_chance_goes_as_far_in_5_percent(
        self, num_seeds
    ):
        stats = pytest.importorskip("scipy.stats")
        needed = stats.t.ppf(0.975, num_seeds - 1)
        assert Difference(num_seeds, -1.001 * needed, 1.0).significant
        assert not Difference(num_seeds, 0.999 * needed, 1.0).significant

    def test_seeds_that_agree_to_the_image_are_no_proof(self):
        results = natural_runs("st", 98.0, 98.4, num_test=500)
        results += natural_runs("sam,rho=0.2", 98.2, 98.6, num_test=500)
        found = difference(summarize(results, rows=ROWS), 1)
        assert found.standard_error == pytest.approx(0, abs=1e-9)
        assert not found.significant

    def test_an_accuracy_of_0_on_three_images_is_no_certainty(self):
        table = summarize(natural_runs("st", 0.0, num_test=3), rows=ROWS)
        assert sampling_error(table) > 20

    def test_the_notes_name_what_is_missing_and_what_the_runs_ran_on(self):
        said = notes(grid(rows=ROWS[:3]))
        assert "missing: AT (linf, eps = 8/255), AT (l2, eps = 128/255)." in said
        assert said[-1] == "Measured at commit abc123 on CPU with jax 0.10.0."

    def test_the_notes_name_whoever_measured_a_column_and_under_which_flags(self):
        made = {"commit": "abc123", "flags": {"XLA_FLAGS": "--xla_fast=1"}}
        others = {"linf 1/255": {"commit": "def456"}, "natural": made}
        result = run("st", provenance=made, column_provenance=others)
        result["pgd_provenance"] = {"commit": "fed789"}
        said = notes(summarize([result], rows=ROWS[:1]))
        measured = "Measured at commit abc123, def456, fed789"
        assert said[-1] == f"{measured}, some under XLA_FLAGS=--xla_fast=1."

    def test_costs_of_several_devices_are_doubted(self):
        results = [run("st"), run("sam,rho=0.2", provenance={"device": "TPU"})]
        said = notes(summarize(results, rows=ROWS))
        assert "The runs used several devices: the costs may not compare." in said


class TestMarkdown:
    def test_every_line_of_the_table_has_the_same_cells(self):
        lines = to_markdown(grid(paper=PAPER, title="CIFAR-10")).splitlines()
        assert lines[:2] == ["### CIFAR-10", ""]
        table = lines[2 : lines.index("", 2)]
        assert len(table) == 2 + len(ROWS)
        assert all(part.startswith("| ") and part.endswith(" |") for part in table)
        assert {part.count("|") for part in table} == {len(COLUMNS) + 4}
        assert table[1] == "| :--- |" + " ---: |" * (len(COLUMNS) + 2)

    def test_a_cell_is_mean_spread_and_paper_and_the_best_is_bold(self):
        text = to_markdown(grid(paper=PAPER))
        # The shifts 0.5, -0.25, 0.125 have mean 0.125 and std 0.375.
        assert "| ST | 3 | 94.7 ±0.4 (94.6) | 39.7 ±0.4 (39.6) |" in text
        assert "| SAM (rho = 0.2) | 3 | **95.6** ±0.4 (95.5) |" in text

    def test_ties_are_all_bold(self):
        # Both AT rows have 78.4 in the paper.
        assert to_markdown(grid()).count("**78.5** ±0.4") == 2

    def test_a_missing_row_has_dashes_and_a_note(self):
        text = to_markdown(grid(rows=ROWS[:4]))
        assert line(text, "| AT (l2") == (
            "| AT (l2, eps = 128/255) | 0 | - | - | - | - | - | - |"
        )
        assert "* missing: AT (l2, eps = 128/255)." in text

    def test_one_seed_has_no_spread(self):
        text = to_markdown(grid(seeds=1))
        assert line(text, "| ST").startswith("| ST | 1 | 95.1 | 40.1 |")
        assert "one seed" in text

    def test_the_caption_is_there(self):
        assert "\n\nPGD with 10 steps.\n\n" in to_markdown(
            grid(caption="PGD with 10 steps.")
        )

    def test_a_label_cannot_break_the_table(self):
        table = summarize([run("st")], rows=[("st", "a | b\nc")])
        assert line(to_markdown(table), "| a ").startswith(r"| a \| b c | 1 | 95.1 |")

    def test_the_differences_of_all_rows_are_folded_below(self):
        results = natural_runs("st", 80.0, 70.0) + natural_runs("sam,rho=0.2", 94, 85)
        results += natural_runs("sam,rho=0.4", 81.0, 69.0)
        text = to_markdown(summarize(results, rows=ROWS))
        below = text[text.index("<details>") :]
        assert "| SAM (rho = 0.2) | **+14.5** ± 0.5 |" in below
        assert "| SAM (rho = 0.4) | +0.0 ± 1.0 |" in below
        assert below.endswith("</details>\n")


class TestCsvAndJson:
    def test_csv_is_tidy_and_exact(self):
        table = grid(rows=ROWS[:4], paper=PAPER)
        lines = list(csv.DictReader(io.StringIO(to_csv(table))))
        assert list(lines[0]) == ["row", "label", "column", "n", "mean", "std", "paper"]
        assert len(lines) == len(ROWS) * len(COLUMNS)
        first, last = lines[0], lines[-1]
        assert (first["row"], first["label"], first["n"]) == ("st", "ST", "3")
        assert float(first["mean"]) == table.rows[0].cells["natural"].mean
        assert float(first["std"]) == table.rows[0].cells["natural"].std
        assert last["label"] == "AT (l2, eps = 128/255)"
        assert (last["n"], last["mean"], last["std"]) == ("0", "", "")
        assert float(last["paper"]) == 87.1

    def test_json_holds_every_value_of_every_seed(self):
        table = grid(paper=PAPER, caption="A caption.", title="A title")
        content = json.loads(to_json(table))
        assert (content["title"], content["caption"]) == ("A title", "A caption.")
        assert content["notes"] == list(notes(table))
        assert content["columns"] == COLUMNS
        assert content["missing"] == []
        assert [row["name"] for row in content["rows"]] == [name for name, _ in ROWS]
        row = content["rows"][1]
        assert (row["seeds"], row["n"], row["cost"]) == ([0, 1, 2], 3, 2.0)
        cell = row["cells"]["natural"]
        assert cell["values"] == [96.0, 95.25, 95.625]
        assert cell["mean"] == statistics.mean(cell["values"])
        assert cell["std"] == statistics.stdev(cell["values"])
        assert cell["paper"] == 95.5
        assert cell["difference"]["num_seeds"] == 3

    def test_json_holds_the_provenance_of_every_run(self):
        content = json.loads(to_json(grid()))
        assert len(content["runs"]) == 3 * len(ROWS)
        assert content["runs"][0] == {
            "row": "st",
            "seed": 0,
            "training_seconds": 512.3,
            "step_seconds": 0.01,
            "provenance": {"commit": "abc123", "jax": "0.10.0", "device": "CPU"},
        }

    def test_json_gives_the_table_back(self):
        table = grid(paper=PAPER, title="A title", passes={"st": 1, "sam,rho=0.2": 2})
        assert from_json(to_json(table)) == table

    def test_json_says_null_for_what_is_not_known(self):
        result = run("st")
        del result["provenance"], result["step_seconds"], result["training_seconds"]
        content = json.loads(to_json(summarize([result], rows=ROWS)))
        assert content["runs"][0].get("provenance") is None
        assert content["rows"][0]["cost"] is None
        assert content["rows"][0]["cells"]["natural"]["std"] is None


class TestTerminal:
    @pytest.mark.parametrize("width", [80, 100, 130])
    @pytest.mark.parametrize("seeds", [1, 3])
    def test_each_row_is_one_line_that_fits_and_loses_nothing(self, width, seeds):
        text = printed(grid(seeds=seeds, paper=PAPER), width)
        lines = text.splitlines()
        assert max(map(len, lines)) <= width
        assert "…" not in text
        table = lines[2 : lines.index("", 2)]
        filled = [part for part in table if part.strip()]
        assert len(filled) == 2 + len(ROWS)
        for row in ROWS:
            shown = [
                part for part in filled if short_label(row[1]) in short_label(part)
            ]
            assert len(shown) == 1
            assert all(f"({v:.1f})" in shown[0] for v in ACCURACIES[row[0]])

    def test_a_wide_terminal_shows_everything(self):
        text = printed(grid(paper=PAPER), 130)
        assert "linf 1/255" in text
        first = line(text, "ST ")
        assert "94.7 ±0.4 (94.6)" in first
        assert first.rstrip().endswith("1.0x")

    def test_a_hundred_columns_keep_the_std_and_the_paper(self):
        text = printed(grid(paper=PAPER), 100)
        assert "94.7±0.4 (94.6)" in line(text, "ST ")
        assert "radii in 1/255" in text.splitlines()[0]

    def test_eighty_columns_say_the_largest_std_once(self):
        text = " ".join(printed(grid(paper=PAPER), 80).split())
        assert "94.7 (94.6)" in text
        assert "standard deviation at most 0.4" in text

    def test_without_the_paper_a_hundred_columns_show_the_spaced_cells(self):
        assert "94.7 ±0.4" in line(printed(grid(), 100), "ST ")

    def test_the_families_are_apart(self):
        lines = printed(grid(), 130).splitlines()
        table = lines[4 : lines.index("", 4)]
        shape = [part.split()[0] if part.strip() else "" for part in table]
        assert shape == ["ST", "", "SAM", "SAM", "", "AT", "AT"]

    def test_the_best_is_bold_and_the_paper_dim(self):
        colours = {"force_terminal": True, "color_system": "standard"}
        text = printed(grid(paper=PAPER), 130, **colours)
        assert "\x1b[1m95.6\x1b[0m" in text
        assert "\x1b[2m (95.5)\x1b[0m" in text

    def test_the_number_of_seeds_is_a_column_only_where_it_differs(self):
        results = [run("st", 0), run("st", 1), run("sam,rho=0.2")]
        text = printed(summarize(results, rows=ROWS), 130)
        assert line(text, "ST ").split()[1] == "2"
        assert line(text, "SAM (rho = 0.2)").split()[4] == "1"
        assert line(printed(grid(), 130), "ST ").split()[1] == "94.7"

    def test_a_missing_row_has_dashes(self):
        text = printed(grid(rows=ROWS[:4]), 130)
        assert line(text, "AT (l2").split(")")[1].split() == ["-"] * 6
        assert "missing: AT (l2, eps = 128/255)." in text

    def test_a_label_is_never_markup(self):
        table = summarize([run("st")], rows=[("st", "[bold]ST[/bold]")])
        assert "[bold]ST[/bold]" in printed(table, 100)

    def test_a_terminal_without_unicode_gets_ascii(self, tmp_path):
        with open(tmp_path / "out.txt", "w", encoding="ascii") as file:
            Console(file=file, width=100).print(to_rich(grid(paper=PAPER)))
        assert "94.7+-0.4 (94.6)" in (tmp_path / "out.txt").read_text()


class TestPlot:
    @pytest.mark.parametrize(
        "table",
        [
            grid(paper=PAPER, title="CIFAR-10"),
            grid(seeds=1, rows=ROWS[:2]),
            summarize(natural_runs("at,norm=l2,eps=128", 100.0), rows=ROWS),
            summarize(
                [run("st") | {"row": "trades"}], rows=[("trades", "$a$ < TRADES_x")]
            ),
            grid(title="A very long title of a table. " * 5),
        ],
        ids=["all", "missing", "one column", "other family", "long title"],
    )
    def test_the_picture_has_a_sensible_size(self, table, tmp_path):
        write_figure(draw_table(table), tmp_path, "table", ("png",))
        with open(tmp_path / "table.png", "rb") as file:
            header = file.read(24)
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = (int.from_bytes(header[i : i + 4]) for i in (16, 20))
        assert 850 <= width <= 1300
        assert 200 <= height <= 800

    def test_another_suffix_is_another_format(self, tmp_path):
        write_figure(draw_table(grid()), tmp_path, "table", ("svg",))
        assert "<svg" in (tmp_path / "table.svg").read_text()

    ACCURACY = {
        "natural": 95.0,
        "linf 1/255": 60.0,
        "linf 1/255 AA": 50.0,
        "linf 2/255": 30.0,
        "l2 16/255": 70.0,
    }

    def drawn(self, *accuracies, **options):
        """The picture of ST under several attacks."""
        runs = [run("st", i, accuracy) for i, accuracy in enumerate(accuracies)]
        return draw_table(summarize(runs, rows=ROWS[:1], **options))

    def test_pgd_and_autoattack_of_one_ball_share_a_panel_hollow_and_filled(self):
        panels = self.drawn(self.ACCURACY).axes
        assert [panel.get_title() for panel in panels] == [
            "natural",
            "\u2113\u221e, \u03b5 = 1/255",
            "\u2113\u221e, \u03b5 = 2/255",
            "\u21132, \u03b5 = 16/255",
        ]
        marks = {
            place: mark.get_markerfacecolor() != "white"
            for panel in panels
            for mark in panel.lines
            if mark.get_marker() == "o"
            for place in np.asarray(mark.get_xdata()).tolist()
        }
        assert marks == {95: True, 60: False, 50: True, 30: True, 70: True}

    def test_panels_of_one_norm_share_their_range(self):
        natural, one, two, l2 = (
            panel.get_xlim() for panel in self.drawn(self.ACCURACY).axes
        )
        assert one == two
        assert one[0] < 30 < 60 < one[1]
        assert len({natural, one, l2}) == 3

    @pytest.mark.parametrize(
        ("accuracies", "options", "labels"),
        [
            ([ACCURACY], {}, ["PGD", "AutoAttack", "ST, AutoAttack"]),
            ([{"natural": 95.0}], {}, ["measured", "ST"]),
            ([{"natural": 95.0}], {"paper": PAPER}, ["measured", "the paper's", "ST"]),
            (
                [{"natural": 95.0, "natural best": 96.0}],
                {},
                ["last checkpoint", "best checkpoint", "ST"],
            ),
        ],
    )
    def test_the_legend_names_what_is_drawn(self, accuracies, options, labels):
        (legend,) = self.drawn(*accuracies, **options).legends
        assert [text.get_text() for text in legend.get_texts()] == labels


def test_no_text_becomes_markup_in_markdown():
    cell = "<b>x</b> [y](http://z) `q` ~~s~~ <!-- a|b *c* _d_ \\ [1, 1] < 3"
    shown = r"\<b>x\</b> [y\](http://z) \`q\` \~~s\~~ \<!-- "
    shown += r"a\|b \*c\* \_d\_ \\ [1, 1] < 3"
    sheet = Sheet([TextTable(("h",), [(cell,)], title="<i>")], ["of <script> and < 3"])
    text = sheet.to_markdown()
    assert f"| {shown} |" in text
    assert r"**\<i>**" in text
    assert text.endswith("of \\<script> and < 3\n")


class TestCosts:
    def test_a_step_of_smaller_batches_may_be_faster_than_sts(self):
        name = "st,training.batch_size=64"
        runs = [
            run("st", seed, step_seconds=0.010, training_steps=360) for seed in (0, 1)
        ]
        runs += [
            run("st", seed, step_seconds=0.005, training_steps=720) | {"row": name}
            for seed in (0, 1)
        ]
        table = summarize(runs, rows=[("st", "ST"), (name, "ST with batch size 64")])
        assert [row.shown_cost() for row in table.rows] == ["1.0x", "1.0x"]


class TestPrices:
    passes = dict(zip(ACCURACIES, (1, 2, 2, 7.67, 7.67), strict=True))

    def test_they_are_drawn_where_methods_cost_differently(self, tmp_path):
        table = grid(passes=self.passes)
        names = [path.name for path in write_table(table, tmp_path)]
        assert names[-2:] == ["table.png", "table-cost.png"]
        assert not has_prices(grid())
        assert not has_prices(grid(passes=dict.fromkeys(self.passes, 1)))

    def test_panels_show_the_end_radii_under_the_strongest_attack(self):
        accuracy = {"natural": 95.0, "linf 2/255": 30.0, "linf 4/255": 9.0}
        accuracy |= {"linf 1/255": 60.0, "linf 1/255 AA": 50.0, "l2 16/255": 70.0}
        runs = [run(row, accuracy=accuracy) for row in ("st", "sam,rho=0.2")]
        figure = draw_prices(summarize(runs, rows=ROWS, passes=self.passes))
        titles = [panel.get_title() for panel in figure.axes]
        assert titles == [
            "\u2113\u221e, \u03b5 = 1/255, AutoAttack",
            "\u2113\u221e, \u03b5 = 4/255",
            "\u21132, \u03b5 = 16/255",
        ]

    def draw_sams(self, count):
        """The only panel of ST and of so many alike settings of SAM."""
        rows = [("st", "ST"), *((f"sam,rho={i}", f"SAM {i}") for i in range(count))]
        runs = [
            run("st", accuracy={"natural": 99.0, "linf 1/255": 50 + i}) | {"row": name}
            for i, (name, _) in enumerate(rows)
        ]
        passes = {name: 2 if "sam" in name else 1 for name, _ in rows}
        figure = draw_prices(summarize(runs, rows=rows, passes=passes))
        figure.draw_without_rendering()
        (panel,) = figure.axes
        return panel

    def test_names_of_alike_methods_do_not_cover_each_other(self):
        panel = self.draw_sams(30)
        boxes = sorted(
            (text.get_window_extent() for text in panel.texts[1:]), key=lambda b: b.y0
        )
        assert len(boxes) == 30
        assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
        heights = sorted(text.get_position()[1] for text in panel.texts)
        low, high = panel.get_ylim()
        assert low <= heights[0] < heights[-1] <= high

    def test_names_end_before_the_dots_of_costlier_methods(self):
        labels = {
            "st,training.weight_decay=0.002": ("ST with weight decay 0.002", 1.0),
            "sam,rho=0.8,start=0.8": ("SAM (rho = 0.8) from 0.8 on", 1.2),
            "esam,rho=0.1": ("ESAM (rho = 0.1)", 1.83),
            "sam,rho=0.2": ("SAM (rho = 0.2)", 2.0),
            "at,norm=linf,eps=0.25": ("AT (linf, eps = 0.25/255)", 7.67),
        }
        passes = {"st": 1.0} | {name: cost for name, (_, cost) in labels.items()}
        rows = [("st", "ST"), *((name, label) for name, (label, _) in labels.items())]
        accuracy = {"natural": 99.0, "linf 1/255": 50.0}
        runs = [run("st", accuracy=accuracy) | {"row": name} for name, _ in rows]
        figure = draw_prices(summarize(runs, rows=rows, passes=passes))
        figure.draw_without_rendering()
        (panel,) = figure.axes
        place = panel.transData.transform
        dots = [place((math.log2(cost), 50.0))[0] for cost in passes.values()]
        for text in panel.texts:
            box = text.get_window_extent()
            assert not [dot for dot in dots if box.x0 <= dot <= box.x1 + 3], text

    def test_in_a_crowd_the_best_of_a_family_is_named(self):
        panel = self.draw_sams(31)
        assert [text.get_text() for text in panel.texts] == ["ST", "SAM 30"]
        assert "of more than 30 alike, the best" in panel.get_xlabel()
        assert len(panel.containers) == 32 + 1  # a dot each, and the legend's


class TestWriteTable:
    def test_it_writes_four_files_and_nothing_else(self, tmp_path):
        table = grid(paper=PAPER)
        directory = tmp_path / "new" / "place"
        paths = write_table(table, directory)
        names = ["table.md", "table.csv", "table.json", "table.png"]
        assert [path.name for path in paths] == names
        assert sorted(os.listdir(directory)) == sorted(names)
        assert (directory / "table.md").read_text("utf-8") == to_markdown(table)
        assert (directory / "table.csv").read_text("utf-8") == to_csv(table)
        assert (directory / "table.json").read_text("utf-8") == to_json(table)

    def test_it_replaces_an_older_table(self, tmp_path):
        write_table(grid(seeds=1), tmp_path)
        write_table(grid(seeds=3), tmp_path)
        assert json.loads((tmp_path / "table.json").read_text())["rows"][0]["n"] == 3

    def test_a_failure_leaves_the_older_file_and_no_rubbish(
        self, tmp_path, monkeypatch
    ):
        write_table(grid(seeds=1), tmp_path)
        before = (tmp_path / "table.png").read_bytes()

        def fail(_, path, **__):
            path.write(b"half a picture")
            raise OSError("disk full")

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
        with pytest.raises(OSError, match="disk full"):
            write_table(grid(seeds=3), tmp_path)
        assert (tmp_path / "table.png").read_bytes() == before
        assert len(os.listdir(tmp_path)) == 4


def test_families_follow_the_names_of_rows():
    names = ["st", "sam,rho=0.2", "at,norm=l2,eps=8", "at,norm=linf,eps=8+sam,rho=1"]
    assert [family(n) for n in names] == ["ST", "SAM", "AT l2", "AT+SAM linf"]


def test_importing_the_package_imports_neither_jax_nor_matplotlib():
    code = (
        "import sys, samrobust.experiments.reporting; "
        "assert not {'jax', 'matplotlib', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
