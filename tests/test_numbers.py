"""The numbers of README, docs and results/ are those that are stored, recomputed.

Each Markdown table is either held, cell by cell, to files in results/, at the digits
that are printed, or listed as one of words. Sentences with numbers are written here
with a formula in each number's place, and must stand in the text. Where results are
measured anew, the failures say what the text must read.
"""

import functools
import importlib
import itertools
import json
import math
import pathlib
import re
import runpy
import statistics
from typing import Any

import pytest
from scipy import stats

from samrobust.evaluation.diagnostics.finding import allowance
from samrobust.experiments import config_files, configuration
from samrobust.experiments.leaderboard import read_claims, to_sheet
from samrobust.experiments.reporting.render import from_json, to_json, to_markdown
from samrobust.experiments.reporting.table import Cell, Difference, Table
from samrobust.studies.bench import report as bench_report
from samrobust.studies.bench.results import BenchReport
from samrobust.studies.sharpness import findings
from samrobust.studies.sharpness.probe import QUANTITIES, ProbeSettings

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "results"
PAGES = [
    *("README.md", "CONTRIBUTING.md", "results/README.md", "launch/README.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
WRITTEN = sorted(str(path.relative_to(ROOT)) for path in RESULTS.rglob("*/*.md"))
TABLES = sorted(  # what `table` and `recheck` wrote
    str(path.relative_to(RESULTS).with_suffix(""))
    for name in ("table.json", "autoattack.json")
    for path in RESULTS.rglob(name)
)
# Tables without a measured number, by their header.
WORDS = {
    (
        *("", "adversary: the images", "objective: the loss", "sharpness: in `tx`"),
        "averaging: what is evaluated",
    ),
    ("", "reference code", "samrobust", "because"),
    ("`--config.data.name=`", "is"),
    (
        *("after a kill a run ends", "on CPUs", "on a GPU"),
        "with `training.deterministic` on a GPU",
    ),
    ("array", "meaning"),
    ("code", "meaning", "SLURM", "Kubernetes", "`tpu_vm.sh up`"),
    ("folder", "command", "hardware"),
    ("here", "there"),
    ("in the file", ""),
    ("measure", "formula", "how, and by default"),
    ("method", "`update` also takes"),
    ("model", "`logits_fn`"),
    ("module", ""),
    ("on a disk", "in a bucket", "cost there"),
    ("row", "what it descends by", "cost", "m-sharpness"),  # held by test_phases
    ("row", "what it trains on", "cost"),  # held by test_phases
    ("value", "running statistics come from", "as in"),
    ("where", "command"),
    ("where", "one command"),
    ("you want to", "read"),
}
FAMILY_AA, SHARPNESS_AA = "adversarial/digits/autoattack", "sharpness/digits/autoattack"
FOUR_AA = "adversarial/digits-four-radii/autoattack"  # the same networks, some rows
NEAR_AA = "sharpness/digits-small-radii/autoattack"  # other networks
SHARPNESS, FAMILY = "sharpness/digits/table", "adversarial/digits/table"
REAL = "sharpness/cifar10-small/table"
REAL_AGAIN = "sharpness/cifar10-small-again/table"  # other networks
REAL_AA = "sharpness/cifar10-small-again/autoattack"
REAL_L2 = "sharpness/cifar10-small-three-radii/autoattack"  # the same networks
CHEAP = "adversarial/cifar10-small/table"
CHEAP_AA = "adversarial/cifar10-small/autoattack"
DIGITS, SMALL, FULL = "digits/table", "cifar10-small/table", "h200/cifar10/table"
DIGITS_AA, SMALL_AA, FULL_AA = (
    f"{folder}/autoattack"
    for folder in ("autoattack/digits", "autoattack/cifar10-small", "h200/cifar10")
)
AT_FULL = "h200/cifar10/at"

COUNTS = {3: "three", 5: "five", 6: "six", 7: "seven"}

Rows = list[list[str]]


# --- what is stored -------------------------------------------------------------------


@functools.cache
def stored(name: str) -> Any:
    """A file of results/: JSON, or a list of its lines."""
    text = (RESULTS / name).read_text()
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


@functools.cache
def table(name: str) -> Table:
    """A table made of what each seed measured, and of nothing that was derived."""
    return from_json((RESULTS / f"{name}.json").read_text())


def cell(name: str, row: str, column: str) -> Cell:
    return next(r for r in table(name).rows if r.name == row).cells[column]


def mean(name: str, row: str, column: str) -> float:
    value = cell(name, row, column).mean
    assert value is not None
    return value


def difference(name: str, row: str, column: str) -> Difference:
    found = cell(name, row, column).difference
    assert found is not None
    return found


def gain(name: str, row: str, column: str, form: str = ".1f", factor: int = 1) -> str:
    """What a row adds to ST, ± the standard error where there are several seeds."""
    found = difference(name, row, column)
    text = format(factor * found.mean, form)
    error = found.standard_error
    return text if error is None else f"{text} ± {error:.1f}"


def lead(name: str, row: str, other: str, column: str) -> tuple[float, float]:
    """How far a row is from another one, paired by seed, and its standard error."""
    values = (cell(name, x, column).values for x in (row, other))
    apart = [a - b for a, b in zip(*values, strict=True)]
    return statistics.fmean(apart), statistics.stdev(apart) / math.sqrt(len(apart))


def is_beyond_chance(name: str, apart: float, error: float) -> bool:
    """Whether a row is ahead of another by more than a t-test lets pass."""
    (count,) = {len(row.seeds) for row in table(name).rows}
    return bool(apart > stats.t.ppf(0.975, count - 1) * error > 0)


@functools.cache
def ahead(name: str, row: str, other: str, column: str) -> str:
    return "{:.1f} ± {:.1f}".format(*lead(name, row, other, column))


def paper(config: str) -> dict[str, dict[str, float]]:
    """The paper's table as the config has it."""
    path = str(ROOT / "configs" / config)
    rows = config_files.load_rows(path)
    return {row: dict(configuration.load_config(f"{path}:{row}").paper) for row in rows}


def bench(name: str, **fields: str) -> dict[str, Any]:
    fields = {"kind": "step", "variant": ""} | fields
    rows = stored(f"{name}/bench.json")["rows"]
    (found,) = [r for r in rows if all(r[k] == v for k, v in fields.items())]
    return found


def profile() -> dict[str, list[float]]:
    """The H200's trace, by kind of kernel: microseconds, per cent, number a step."""
    (rows,) = tables((RESULTS / "h200/profile.md").read_text())
    return {name: [float(x) for x in numbers] for name, *numbers in rows[1:]}


def speed(directory: str) -> float:
    """Images a second of a run's median epoch."""
    lines = stored(f"{directory}/metrics.jsonl")
    return statistics.median(line["examples_per_second"] for line in lines)


# --- tables ---------------------------------------------------------------------------


def tables(text: str) -> list[Rows]:
    """The cells of a text's Markdown tables, without rulers."""
    found = []
    lines = text.splitlines()
    for is_table, group in itertools.groupby(lines, lambda x: x.startswith("|")):
        if is_table:
            rows = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in group]
            cells = [[part.strip() for part in row] for row in rows]
            found.append([r for r in cells if not set("".join(r)) <= set(":-")])
    return found


def rendered(name: str) -> Rows:
    return tables(to_markdown(table(name)))[0]


def without_cost(name: str) -> Rows:
    """As rendered, without the passes and the cost."""
    head, *rows = rendered(name)
    kept = [i for i, title in enumerate(head) if title not in ("passes", "cost")]
    return [[row[i] for i in kept] for row in (head, *rows)]


def plain(name: str, columns: dict[str, str]) -> Rows:
    """Means and deviations; `columns` maps the table's to the page's names."""

    def shown(found: Cell) -> str:
        spread = "" if found.std is None else f" ±{found.std:.1f}"
        return f"{found.mean:.1f}{spread}"

    rows = [[r.label, *(shown(r.cells[c]) for c in columns)] for r in table(name).rows]
    return [["method", *columns.values()], *rows]


def beside_autoattack(*columns: str) -> dict[str, str]:
    """Columns under PGD, each with AutoAttack's beside it, by their names on a page."""
    shown = {"natural": "natural"}
    for column in columns:
        shown |= {column: f"{column}, PGD-10", f"{column} AA": "AutoAttack"}
    return shown


def beside_the_paper() -> Rows:
    """The full-size runs on CIFAR-10, each beside the paper's number."""
    numbers = paper("cifar10.py")
    rows: Rows = [["method", "epochs", *table(FULL).columns]]
    for folder in ("st", "sam,rho=0.4", "at"):
        result = stored(f"h200/cifar10/{folder}/result.json")
        epochs = stored(f"h200/cifar10/{folder}/config.json")["training"]["epochs"]
        cells = [
            f"{result['accuracy'][c]:.1f} ({numbers[result['row']][c]:.1f})"
            for c in table(FULL).columns
        ]
        rows.append([result["label"], str(epochs), *cells])
    return rows


def speed_on_the_cpu() -> Rows:
    rows: Rows = []
    for method, label in (("st", "ST"), ("sam", "SAM"), ("at", "AT-10")):
        ours = bench("bench/compare-64", method=method)
        cells = [
            f"{1e3 * ours['step_seconds']:.0f} ±{1e3 * ours['step_iqr']:.0f}",
            f"{100 * ours['matmul_fraction']:.0f}",
            f"{ours['cost']:.1f} ({ours['flop_cost']:.1f})",
        ]
        for variant in ("reference", "tuned"):
            their = bench(
                "bench/compare-64", method=method, kind="pytorch", variant=variant
            )
            low, high = their["ratio_low"], their["ratio_high"]
            cells.append(f"{their['ratio']:.2f} ({low:.2f} to {high:.2f})")
        rows.append([label, *cells])
    pytorch = ["reference's time / ours", "tuned PyTorch's time / ours"]
    return [
        ["batch 64", "ms a step", "% of matmul", "cost (by FLOPs)", *pytorch],
        *rows,
    ]


def speed_on_the_gpu() -> Rows:
    def milliseconds(row: dict[str, Any]) -> str:
        value = 1e3 * row["step_seconds"]
        return f"{value:.2f}" if value < 10 else f"{value:.1f}"

    def ratio(method: str, variant: str) -> str:
        rows = stored("h200/bench-float32/bench.json")["rows"]
        found = [r for r in rows if (r["method"], r["variant"]) == (method, variant)]
        return f"{found[0]['ratio']:.1f}" if found else "-"

    rows: Rows = []
    for method, label in (("st", "ST"), ("sam", "SAM"), ("at", "AT-10")):
        half = bench("h200/bench-bfloat16", method=method)
        full = bench("h200/bench-float32", method=method)
        images, share = half["images_per_second"], 100 * half["matmul_fraction"]
        cells = [milliseconds(half), f"{images:,.0f}", f"{share:.0f}"]
        ratios = [ratio(method, "reference"), ratio(method, "tuned")]
        rows.append([label, *cells, milliseconds(full), *ratios])
    head = ["batch 128", "bfloat16 ms", "images/s", "% of matmul", "float32 ms"]
    return [[*head, "reference's time / ours", "tuned PyTorch's time / ours"], *rows]


@functools.cache
def theory() -> str:
    """The theory's tables and notes as its JSON has them."""
    study, training, experiment, report, verdicts = (
        importlib.import_module(f"samrobust.studies.theory.{name}")
        for name in ("study", "training", "experiment", "report", "verdicts")
    )
    content = stored("theory/theory.json")
    estimates = []
    for line in content["trained"]:
        fields = {k: v for k, v in line.items() if k != "agrees"}
        if line["zero_one"] is None and line["method"] == "at all features":
            fields["zero_one"] = math.inf  # JSON has no infinity
        estimate = experiment.Estimate(**fields)
        assert estimate.agrees == line["agrees"]
        estimates.append(estimate)
    options = {k: tuple(v) for k, v in content["grid"].items() if v is not None}
    found = report.Findings(
        study.Grid(**options),
        training.TrainingEffort(**content["effort"]),
        None,
        [verdicts.Verdict(**verdict) for verdict in content["verdicts"]],
        estimates,
        content["provenance"]["seconds"],
    )
    return report.to_sheet(found).to_markdown()


@functools.cache
def held(page: str) -> tuple[Rows, ...]:
    """The tables of a page that are held to results/, in order."""
    if page == "docs/theory.md" or page == "results/theory/theory.md":
        return tuple(tables(theory()))
    folder = page.removeprefix("results/").rsplit("/", 1)[0]
    if page.endswith(("/table.md", "/autoattack.md")):
        return tuple(tables(to_markdown(table(page[8:-3]))))
    if page == "results/leaderboard/leaderboard.md":
        return tuple(tables(board()))
    if page.endswith("digits/sharpness.md"):
        return flatness_tables(folder)
    if page.endswith("/bench.md"):
        content = stored(f"{folder}/bench.json")  # older ones project hours, too
        found = BenchReport(**{name: content[name] for name in BenchReport._fields})
        return tuple(tables(bench_report.to_sheet(found).to_markdown()))
    if "/sanity/" in page:
        return sanity(page[8:-3])
    if page == "README.md":
        return (rendered(DIGITS),)
    if page == "docs/sharpness.md":
        strong = plain(SHARPNESS_AA, beside_autoattack("linf 32/255", "l2 128/255"))
        real = plain(REAL_AA, beside_autoattack("linf 2/255", "l2 32/255"))
        return rendered(SHARPNESS), strong, rendered(REAL), real
    if page == "docs/adversarial.md":
        return (
            rendered(FAMILY),
            plain(FOUR_AA, beside_autoattack("linf 32/255", "l2 128/255")),
            rendered(CHEAP),
        )
    if page == "docs/flatness.md":
        return (correlations(),)
    if page == "docs/scaling.md":
        return waits(), modeled()
    if page == "docs/speed.md":
        return speed_on_the_cpu(), speed_on_the_gpu(), counted_for_the_gpu()
    if page != "docs/results.md":
        return ()
    return (
        beside_the_paper(),
        without_cost(SMALL),
        plain(DIGITS_AA, beside_autoattack("linf 32/255", "l2 128/255")),
        plain(FULL_AA, beside_autoattack("linf 1/255", "linf 2/255")),
    )


@functools.cache
def flatness(folder: str) -> findings.Explanation:
    """What flatness, confidence and margin have to do with robustness."""
    content, runs = stored(f"{folder}/sharpness.json"), []
    rechecked = {row.name: row for row in table(f"{folder}/autoattack").rows}
    for row in table(f"{folder}/table").rows:
        strong = rechecked[row.name]
        assert strong.seeds == row.seeds
        cells = {c: x for c, x in strong.cells.items() if c[-3:] == " AA"}
        cells |= row.cells
        for number, seed in enumerate(row.seeds):
            name = f"{row.name}/seed{seed}"
            values, accuracy = (
                content["runs"][name]["values"],
                content["accuracy"][name],
            )
            assert accuracy == {c: x.values[number] for c, x in cells.items()}
            runs.append(
                findings.MeasuredRun(row.name, row.label, seed, values, accuracy)
            )
    assert len(runs) == len(content["runs"])
    return findings.explain(runs, content["column"])


def flatness_tables(folder: str) -> tuple[Rows, ...]:
    content = stored(f"{folder}/sharpness.json")
    settings = ProbeSettings(**content["settings"])
    num_images = next(iter(content["runs"].values()))["num_images"]
    sheet = findings.to_sheet(flatness(folder), settings, num_images)
    return tuple(tables(sheet.to_markdown()))


def correlations() -> Rows:
    """Of both families, side by side."""
    families = {"sharpness/digits": "sharpness", "adversarial/digits": "adversarial"}
    columns = ("linf 32/255", "linf 32/255 AA")
    header = [f"{name}, {c}" for name in families.values() for c in columns]
    places = [
        (flatness(folder).correlations, c) for folder in families for c in columns
    ]
    return [
        ["rank correlation", *header],
        *(
            [one.label, *(str(of[key][c]) for of, c in places)]
            for key, one in QUANTITIES.items()
        ),
    ]


def board() -> str:
    """The leaderboard of the claims, each held to the table that it rests on."""
    return to_sheet(read_claims(RESULTS / "leaderboard")).to_markdown()


def counted_for_the_gpu() -> Rows:
    """Kernels and GB of a step that was compiled for an H200, before and after."""
    names = ("ST", "SAM", "AT-10", "TRADES", "AT-10 + AWP")
    before, after = (
        stored(f"bench/aot/{name}.json")["rows"] for name in ("before", "after")
    )
    found = [["", "kernels before", "now", "GB before", "now"]]
    for name, *pair in zip(names, before, after, strict=True):
        kernels = [f"{sum(row['kernels'].values()):,.0f}" for row in pair]
        sizes = [sum(row["bytes"].values()) / 1e9 for row in pair]
        found.append([name, *kernels, *(f"{size:.3g}" for size in sizes)])
    return found


# The model of docs/scaling.md: by name of the fleet its devices, batch, seconds of a
# small all-reduce, and bytes a second of a large one.
FLEETS = {
    "8 GPUs": (8, 128, 15e-6, 200e9),
    "8 GPUs, batch 1024": (8, 1024, 15e-6, 200e9),
    "16 GPUs of two machines": (16, 128, 100e-6, 5e9),
}
KERNEL_SECONDS = 3e-6
LABELS = {"st": "ST", "sam": "SAM", "at": "AT-10"}


def scaling() -> dict[tuple[str, str], dict[str, Any]]:
    """What was counted for eight devices, by method and what BatchNorm is over."""
    return {
        (row["method"].partition(",")[0], over): row
        for file, over in (("global", "the batch"), ("local", "a device's share"))
        for row in stored(f"bench/scaling/{file}.json")["rows"]
    }


def waits() -> Rows:
    """How often eight devices wait for each other in a step, and what each sends."""
    rows = []
    for (method, over), row in scaling().items():
        count, sent = (row[of]["collectives"] for of in ("kernels", "bytes"))
        rows.append([LABELS[method], over, f"{count:,.0f}", f"{sent / 1e6:.1f}"])
    return [["", "BatchNorm over", "waits a step", "MB"], *rows]


def modeled() -> Rows:
    """The rate of images on some devices relative to one, by the model."""
    rows = [["", "BatchNorm over", *FLEETS]]
    for (method, over), row in scaling().items():
        seconds = bench("h200/bench-bfloat16", method=method)["step_seconds"]
        count = row["kernels"]["collectives"]
        least = (sum(row["kernels"].values()) - count) * KERNEL_SECONDS
        rates = []
        for devices, batch, latency, bandwidth in FLEETS.values():
            share = max(seconds * batch / 128 / devices, least)
            sent = 2 * (devices - 1) / devices * row["bytes"]["collectives"]
            step = share + count * latency + sent / bandwidth
            rates.append(seconds * batch / 128 / step)
        rows.append([LABELS[method], over, *(f"{rate:.1f}" for rate in rates)])
    return rows


def sanity(name: str) -> tuple[Rows, ...]:
    """The tables of a report of sanity checks: one of the network, one a ball."""
    findings = stored(f"{name}.json")["findings"]
    groups = itertools.groupby(findings, lambda finding: finding["ball"])
    return tuple(
        [["check", "verdict", "finding"]]
        + [[f["check"], f["verdict"], f["text"].replace("|", "\\|")] for f in group]
        for _, group in groups
    )


# --- sentences ------------------------------------------------------------------------


def natural_words(cost: float) -> str:
    numbers = {7: "seven", 8: "eight", 9: "nine"}
    return "twice" if round(cost) == 2 else f"{numbers[round(cost)]} times"


def digits_in_words() -> list[str]:
    sam = "sam,rho=0.4"
    costs = {row.name: row.cost or 0.0 for row in table(DIGITS).rows}
    at = {natural_words(costs[name]) for name in costs if name.startswith("at")}
    as_long = " or ".join(sorted(at)).replace(" times or", " or")
    return [
        f"SAM alone adds {gain(DIGITS, sam, 'linf 16/255')} points at l-inf 16/255, "
        f"{gain(DIGITS, sam, 'linf 32/255')} at l-inf 32/255, "
        f"{gain(DIGITS, sam, 'l2 64/255')} at l2 64/255 and "
        f"{gain(DIGITS, sam, 'l2 128/255')} at l2 128/255",
        f"at no cost in natural accuracy ({gain(DIGITS, sam, 'natural', '+.1f')}) and "
        f"{natural_words(costs[sam])} the time",
        f"adds far more, at {as_long} the time",
    ]


def full_size_in_words() -> list[str]:
    st, sam = "st", "sam,rho=0.4"
    columns = table(FULL).columns
    numbers, earlier = (
        paper("cifar10.py"),
        stored("h200/cifar10/st-earlier/result.json"),
    )
    above = [mean(FULL, st, c) - numbers[st][c] for c in columns[1:]]
    later = stored("h200/cifar10/st/result.json")["accuracy"]
    less = max(later[c] - earlier["accuracy"][c] for c in columns)
    published = numbers[sam]["linf 1/255"] - numbers[st]["linf 1/255"]
    trained = stored(f"{AT_FULL}/result.json")
    short = [numbers[trained["row"]][c] - trained["accuracy"][c] for c in columns]
    epochs = stored(f"{AT_FULL}/config.json")["training"]["epochs"]
    return [
        f"ST is above it under attack by {min(above):.1f} to {max(above):.1f} points",
        "an earlier run with the same seed gave "
        + ", ".join(f"{earlier['accuracy'][c]:.1f}" for c in columns)
        + f", up to {less:.2f} points less",
        f"SAM's gain at l-inf 1/255 is {gain(FULL, sam, 'linf 1/255')} points here and "
        f"{published:.1f} in the paper",
        f"AT in {epochs} of 100 epochs is short of the paper's by {min(short):.1f} to "
        f"{max(short):.1f} points",
    ]


def small_in_words() -> list[str]:
    sam, at = "sam,rho=0.2", "at,norm=linf,eps=2"
    found = difference(SMALL, sam, "linf 2/255")
    errors = found.mean / (found.standard_error or math.nan)
    chance = 100 * (found.p_value or math.nan)
    numbers = paper("cifar10.py")
    published = {c: v - numbers["st"][c] for c, v in numbers[at].items()}
    return [
        f"SAM with rho = 0.2 loses {gain(SMALL, sam, 'natural', factor=-1)} points of "
        f"natural accuracy and {gain(SMALL, sam, 'l2 16/255', factor=-1)} at l2 16/255;"
        f" its {gain(SMALL, sam, 'linf 2/255')} at l-inf 2/255 are {errors:.2f} "
        f"standard errors, which chance alone exceeds in {chance:.0f} % of cases with "
        f"{COUNTS[found.num_seeds]} seeds",
        f"AT gains at l-inf ({gain(SMALL, at, 'linf 1/255')} and "
        f"{gain(SMALL, at, 'linf 2/255')}) and at l2 32/255 "
        f"({gain(SMALL, at, 'l2 32/255')}), but loses "
        f"{gain(SMALL, at, 'natural', factor=-1)} points of natural accuracy and gains "
        f"nothing at l2 16/255 ({gain(SMALL, at, 'l2 16/255')}), where the same row of "
        f"the paper loses {-published['natural']:.1f} and gains "
        f"{published['l2 16/255']:.1f}",
    ]


def example_in_words() -> list[str]:
    evaluation = stored(f"{AT_FULL}/evaluations.jsonl")[0]
    label = stored(f"{AT_FULL}/result.json")["label"]
    natural, robust = evaluation["accuracy"].values()
    after = evaluation["autoattack"]["after_each"]["linf 8/255"]
    return [
        f"{label}: natural {natural:.2f}, linf 8/255 {robust:.2f} (accuracy in %)",
        "linf 8/255 after " + ", ".join(f"{k} {v:.2f}" for k, v in after.items()),
    ]


def autoattack_in_words() -> list[str]:
    sam = "sam,rho=0.4"
    _, robust = stored(f"{AT_FULL}/evaluations.jsonl")[0]["accuracy"].values()

    def both(name: str, column: str, row: str = sam) -> list[str]:
        return [gain(name, row, f"{column}{x}", "+.1f") for x in (" AA", "")]

    linf, l2 = both(DIGITS_AA, "linf 32/255"), both(DIGITS_AA, "l2 128/255")
    one, two = both(FULL_AA, "linf 1/255"), both(FULL_AA, "linf 2/255")
    small = both(SMALL_AA, "linf 2/255", "sam,rho=0.2")
    trained = both(SMALL_AA, "linf 2/255", "at,norm=linf,eps=2")
    seeds = f"{COUNTS[len(table(DIGITS_AA).rows[0].seeds)]} seeds each"
    more, error, counts = more_under_autoattack("linf 1/255")
    more_at_two, error_at_two, _ = more_under_autoattack("linf 2/255")
    assert more > 2 * error
    assert more_at_two < 2 * error_at_two
    flattered = max(
        mean(FULL_AA, row, c) - mean(FULL_AA, row, f"{c} AA")
        for row in ("st", sam)
        for c in ("linf 1/255", "linf 2/255")
    )
    return [
        f"{linf[0]} points at l-inf 32/255 where PGD-10 said {linf[1]}, {l2[0]} at l2 "
        f"128/255 where it said {l2[1]}",
        f"({table(DIGITS_AA).num_test} test images; in percent",
        f"On digits, {seeds}, the networks of the README's table"
        if same_networks()
        else f"On digits, {seeds}, other networks than those of the README's table",
        f"({table(FULL_AA).num_test:,} test images, one seed",
        f"a larger gain than PGD-10 at 1/255, {one[0]} points instead of {one[1]}: "
        f"{more:.1f} more, with a standard error of at most {error:.1f} from the "
        f"choice of images ({counts[0]} images of ST and {counts[1]} of SAM withstood",
        f"At 2/255, {two[0]} instead of {two[1]}, the {more_at_two:.1f} more may be "
        f"chance (at most {error_at_two:.1f})",
        f"by up to {flattered:.0f} points",
        f"SAM's {mean(FULL_AA, sam, 'linf 2/255 AA'):.1f} % at 2/255 with the "
        f"{robust:.1f} % that AT (30 epochs) keeps",
        f"on {table(SMALL_AA).num_test} images, {small[1]} points under PGD-10 and "
        f"{small[0]} under AutoAttack, AT {trained[1]} and {trained[0]}",
        *upstream_in_words(),
    ]


def more_under_autoattack(column: str) -> tuple[float, float, list[int]]:
    """How much larger SAM's gain is under AutoAttack than under PGD, in points.

    Also a bound on its standard error, and the images of ST and of SAM that withstood
    PGD alone. Of an image the difference is 1, 0 or -1; the variance is largest where
    no image is among both rows' (AutoAttack breaks what PGD breaks).
    """
    total = table(FULL_AA).num_test
    counts = [
        round(
            total * (mean(FULL_AA, r, column) - mean(FULL_AA, r, f"{column} AA")) / 100
        )
        for r in ("st", "sam,rho=0.4")
    ]
    more = (counts[0] - counts[1]) / total
    error = math.sqrt((sum(counts) / total - more**2) / total)
    return 100 * more, 100 * error, counts


def upstream_in_words() -> list[str]:
    lines = stored("autoattack/upstream.jsonl")
    apart = sum(x["judged differently"] for x in lines)
    said = []
    for is_digits in (True, False):
        times = [x["seconds"] for x in lines if (x["num_test"] == 500) == is_digits]
        ratios = [x["upstream"] / x["ours"] for x in times]
        over_all = sum(x["upstream"] for x in times) / sum(x["ours"] for x in times)
        said.append((min(ratios), max(ratios), over_all))
    (low, high, over_all), (lower, higher, over_cifar) = said
    return [
        f"agreed on all but {apart} of {sum(x['num_test'] for x in lines):,} images in "
        f"{len(lines)} comparisons under l-inf and l2",
        f"upstream took {low:.1f} to {high:.1f} times our time on digits, "
        f"{over_all:.1f} overall",
        f"and {lower:.1f} to {higher:.1f} times, {over_cifar:.1f} overall, on 100 "
        "images",
    ]


def reference_in_words() -> list[str]:
    ours = bench("bench/compare-64", method="at")["flop_cost"]
    naive = bench("bench/compare-64", method="at", kind="pytorch", variant="reference")
    saved = 100 * (1 - ours / naive["flop_cost"])
    return [f"{saved:.0f} % less arithmetic in a step of AT-10"]


def speed_in_words() -> list[str]:
    methods = ("st", "sam", "at")
    ours = [bench("bench/compare-64", method=m) for m in methods]
    tuned = [
        bench("bench/compare-64", method=m, kind="pytorch", variant="tuned")
        for m in methods
    ]
    *less, more = (100 * (1 - row["ratio"]) for row in tuned)
    shares = [[100 * r["matmul_fraction"] for r in rows] for rows in (tuned, ours)]
    st, at = (bench("bench/batch-128", method=m) for m in ("st", "at"))
    evaluation = bench("bench/batch-128", kind="evaluation")
    rows = stored("bench/compare-64/bench.json")["rows"]
    cold = [row["compile_cold"] for row in rows if "compile_cold" in row]
    loop = bench("bench/loop", kind="unrolled")
    commit, date = (
        stored("bench/compare-64/bench.json")["provenance"][key]
        for key in ("commit", "date")
    )
    return [
        f"at commit {commit[:7]} of {int(date[8:10])} November 2026",
        f"takes {min(less):.0f} % less time than we do for ST and SAM, {-more:.0f} % "
        f"more for AT-10: its steps reach {min(shares[0]):.0f} to {max(shares[0]):.0f} "
        f"% of the rate of a matrix product, ours {min(shares[1]):.0f} to "
        f"{max(shares[1]):.0f} %",
        f"an ST epoch took {st['epoch_seconds'] / 60:.0f} minutes and an AT "
        f"epoch {at['epoch_seconds'] / 3600:.1f} hours, drawing and augmenting batches "
        f"{100 * st['pipeline_share']:.2f} % of that",
        f"cost {evaluation['st_epochs']:.1f} ST epochs",
        f"Compilation takes {min(cold):.0f} to {max(cold):.0f} s in each process",
        f"takes {loop['ratio']:.2f} ({loop['ratio_low']:.2f} to "
        f"{loop['ratio_high']:.2f}) times as long",
        *attacked_in_evaluation(),
        *aims_in_words(),
        *gpu_in_words(),
    ]


def attacked_in_evaluation() -> list[str]:
    """What a step of an attack moves, and what its BatchNorms with ReLU have to."""
    (row,) = stored("bench/aot/evaluation.json")["rows"]
    step, inputs, shape = row["bodies"][0], 0, (64, 32)  # channels, side
    for stage in ((64, 32), (128, 16), (256, 8), (512, 4)):
        for channels, side in (shape, stage, stage, stage):  # two blocks of two
            inputs += channels * side**2
        shape = stage
    inputs += 512 * 4**2
    least = 5 * inputs * row["batch_size"] * 2  # two passes forward, three backward
    moved = {kind: size / 1e9 for kind, size in step["bytes"].items()}
    return [
        f"takes {sum(step['kernels'].values()):.0f} kernels and "
        f"{sum(moved.values()):.2f} GB at batch {row['batch_size']}: "
        f"{moved['convolutions']:.2f} of cuDNN's convolutions and "
        f"{moved['loop fusions']:.2f} of elementwise work, of which BatchNorm with its "
        f"ReLU alone takes {least / 1e9:.2f} in 5 activations' worth",
    ]


def aims_in_words() -> list[str]:
    """Which aims in counts a step of ST, and of AT's attack, meet."""
    rows = {row["row"]: row for row in stored("bench/aot/after.json")["rows"]}
    (attack,) = (x for x in rows["at,norm=linf,eps=8"]["bodies"] if x["runs"] == 10)
    (kernels, size), (attacks, moved) = (
        (sum(each["kernels"].values()), sum(each["bytes"].values()) / 1e9)
        for each in (rows["st"], attack)
    )
    assert attacks <= 190
    assert kernels > 230
    assert size > 2.3
    assert moved > 1.9
    return [
        f"an attack's step, which now moves {moved:.2f}.",
        f"only that for an attack's kernels is met ({attacks:.0f}).",
        f"ST takes {kernels:.0f} kernels and {size:.2f} GB, an attack's step "
        f"{moved:.2f} GB; 2.3 GB would lie below the floor.",
    ]


def gpu_in_words() -> list[str]:
    half, full = "h200/bench-bfloat16", "h200/bench-float32"
    ours = bench(half, method="st")["step_seconds"]
    theirs = {
        name: bench(name, method="st", kind="pytorch", variant="tuned")["step_seconds"]
        for name in (half, full)
    }
    steps = 100 * math.ceil(50_000 / 128)
    hours = {
        name: 2
        * 3
        * steps
        / 3600
        * sum(
            bench(name, method=method)["step_seconds"] * count
            for method, count in (("st", 1), ("sam", 3), ("at", 8))
        )
        for name in (half, full)
    }
    rates = [speed(f"h200/cifar10/{x}") for x in ("st", "sam,rho=0.4", "at")]
    shown = [f"{round(rate, -2):,.0f}" for rate in rates]
    kernels = profile()
    busy = kernels["all"][0]
    flops = bench(half, method="st")["tflops"] * 1e12 * ours
    ceiling = stored(f"{half}/bench.json")["ceilings"]["bfloat16"]["matmul"]
    assert flops / (1e-6 * kernels["convolutions"][0]) / ceiling == pytest.approx(
        0.5, abs=0.05
    )
    first = [bench(name, method="st")["compile_cold"] for name in (full, half)]
    later = [
        bench(name, method=method)["compile_cold"]
        for name in (half, full)
        for method in ("sam", "at")
    ]
    return [
        f"PyTorch's tuned ST step took {1e3 * theirs[half]:.1f} ms, longer than its "
        f"own {1e3 * theirs[full]:.2f} ms in float32",
        f"bfloat16 step is {theirs[full] / ours:.1f} times as fast as its best, in "
        f"float32, and {theirs[half] / ours:.1f} times as fast as its bfloat16 step",
        f"the 72 models of Tables 1 and 2 take {hours[half]:.0f} hours of one H200 in "
        f"bfloat16 and {hours[full]:.0f} in float32",
        f"{shown[0]} images/s of ST, {shown[1]} of SAM and {shown[2]} of AT-10",
        f"take {kernels['convolutions'][1]:.0f} % of the GPU's time, at half the rate "
        "of a matrix product",
        f"BatchNorm's reductions take {kernels['reduction fusions'][1]:.0f} %",
        f"{kernels['elementwise fusions'][1]:.0f} %, in "
        f"{round(kernels['all'][2], -2):.0f} kernels a step between which the GPU "
        f"idles for {100 * (1 - 1e-6 * busy / ours):.0f} %",
        f"took {first[0]:.0f} to {first[1]:.0f} s there, later ones {min(later):.0f} "
        f"to {max(later):.0f} s",
    ]


def two_pass(name: str = SHARPNESS) -> list[str]:
    return [
        row.name
        for row in table(name).rows
        if 1.5 < (row.passes or 0) < 2.5 and row.family != "ST"
    ]


def sharpness_in_words() -> list[str]:
    name, sam = SHARPNESS, "sam,rho=0.4"
    hard = ("linf 32/255", "l2 128/255")
    rows, family = {row.name: row for row in table(name).rows}, two_pass()
    ranges = [sorted(difference(name, r, c).mean for r in family) for c in hard]
    ahead = {
        (row, column): lead(name, row, sam, column)
        for row in rows
        if not row.startswith(("at,", "label"))
        for column in table(name).columns
    }
    compared = len(ahead) - len(table(name).columns)  # SAM with itself
    ahead = {key: x for key, x in ahead.items() if is_beyond_chance(name, *x)}
    (((awp, column), (by, error)),) = ahead.items()
    assert (awp, column) == ("awp,gamma=0.04", "linf 16/255")
    strengths = runpy.run_path(str(ROOT / "configs/sharpness.py"))["STRENGTHS"]
    edges = sum(
        template.format(values[i]) in rows
        for template, values in strengths.items()
        for i in (0, -1)
    )
    words = {10: "ten"}

    def over_st(row: str, column: str = "linf 32/255") -> str:
        return gain(name, row, column)

    smooth, at = "label_smoothing,alpha=0.4", "at,norm=linf,eps=4"
    controls = ["st,training.epochs=40", "st,training.weight_decay=0.002"]
    controls += ["swa,start=0.75", "ema,decay=0.9"]
    return [
        f"For {words[edges]} of the {len(strengths)} the best setting is at "
        "an end of its grid",
        f"two-pass methods add {ranges[0][0]:.1f} to {ranges[0][-1]:.1f} points at "
        f"l-inf 32/255 and {ranges[1][0]:.1f} to {ranges[1][-1]:.1f} at l2 128/255",
        f"Only AWP beats SAM beyond chance, by {by:.1f} ± {error:.1f} at l-inf 16/255 "
        f"(paired by seed, ± one standard error), one of {compared} such comparisons",
        "is worth as much as SAM, and {:.1f} ± {:.1f} points more at l2 128/255".format(
            *lead(name, smooth, sam, hard[1])
        ),
        f"it adds {over_st(smooth)} and {over_st(smooth, hard[1])}, SAM "
        f"{over_st(sam)} and {over_st(sam, hard[1])}",
        "Twice the epochs add {} at l-inf 32/255, four times the weight decay {}, SWA "
        "{} and EMA {}".format(*map(over_st, controls)),
        f"adds {over_st(at)} at l-inf 32/255, at {rows[at].passes:.2f} times the "
        "passes",
        f"adds {over_st('sam,rho=1.6,start=0.8')} there at 1.2 times the passes, but "
        f"{over_st('sam,rho=1.6,start=0.8', 'linf 16/255')} at l-inf 16/255",
        *sharpness_under_autoattack_in_words(sam, smooth),
        *small_radii_in_words(sam, smooth),
    ]


def sharpness_under_autoattack_in_words(sam: str, smooth: str) -> list[str]:
    name, far, awp = SHARPNESS_AA, "linf 32/255", "awp,gamma=0.04"
    over = sorted(overstated(name, far).values(), reverse=True)
    assert over[0] == overstated(name, far)[smooth]
    gains = {row: difference(name, row, f"{far} AA").mean for row in two_pass()}
    assert {row for row in gains if gains[row] > gains[sam]} == {awp}
    apart, error = lead(name, awp, sam, f"{far} AA")
    assert apart < error  # "which may be chance"
    wide, fishers = "l2 128/255", ("fisher_sam,rho=0.4", "ssam,mask=fisher,rho=0.8")
    in_l2 = {row: difference(name, row, f"{wide} AA").mean for row in two_pass()}
    assert {row for row in in_l2 if in_l2[row] > in_l2[sam]} == {*fishers}
    leads = [lead(name, row, sam, f"{wide} AA") for row in fishers]
    assert all(apart < error for apart, error in leads)  # "by chance"
    beyond = overstated(name, wide).values()
    return [
        f"on {table(name).num_test} of the test images",
        f"at l-inf 32/255 the two-pass methods add {min(gains.values()):.1f} to "
        f"{max(gains.values()):.1f} points, SAM {gain(name, sam, f'{far} AA')}; AWP "
        f"alone is ahead of it, by {ahead(name, awp, sam, f'{far} AA')}",
        f"smoothing adds {gain(name, smooth, f'{far} AA')}, no longer as much as SAM, "
        f"for PGD overestimates it by {over[0]:.1f} points and the others by "
        f"{over[-1]:.1f} to {over[1]:.1f}",
        f"At l2 128/255 they add {min(in_l2.values()):.1f} to "
        f"{max(in_l2.values()):.1f} points, SAM {gain(name, sam, f'{wide} AA')} and "
        f"label smoothing {gain(name, smooth, f'{wide} AA')}; there PGD overestimates "
        f"all rows, by {min(beyond):.1f} to {max(beyond):.1f} points",
    ]


def small_radii_in_words(sam: str, smooth: str) -> list[str]:
    name, near, narrow = NEAR_AA, "linf 16/255", "l2 64/255"
    at, fisher = "at,norm=linf,eps=4", "fisher_sam,rho=0.4"
    added = [
        [difference(name, row, f"{column} AA").mean for row in two_pass()]
        for column in (near, narrow)
    ]
    for row in table(name).rows[1:]:
        is_sure = difference(name, row.name, f"{near} AA").significant
        assert is_sure == (row.name in (at, fisher))
        assert not difference(name, row.name, f"{narrow} AA").significant
        for column in (near, narrow):  # "no row is ahead of SAM"
            apart = lead(name, row.name, sam, f"{column} AA")
            assert not is_beyond_chance(name, *apart)
    over = [max(overstated(name, column).values()) for column in (near, narrow)]
    return [
        f"At half these radii on {table(name).num_test} images",
        f"the two-pass methods add {min(added[0]):.1f} to {max(added[0]):.1f} points "
        f"at l-inf 16/255 (SAM {gain(name, sam, f'{near} AA')}) and "
        f"{min(added[1]):.1f} to {max(added[1]):.1f} at l2 64/255 (SAM "
        f"{gain(name, sam, f'{narrow} AA')}), label smoothing "
        f"{gain(name, smooth, f'{near} AA')} and {gain(name, smooth, f'{narrow} AA')}, "
        f"adversarial training {gain(name, at, f'{near} AA')} and "
        f"{gain(name, at, f'{narrow} AA')}",
        f"adversarial training's and Fisher SAM's {gain(name, fisher, f'{near} AA')}",
        f"PGD overestimates no row by more than {over[0]:.1f} points at l-inf 16/255 "
        f"and {over[1]:.1f} at l2 64/255",
    ]


def relatives_in_words() -> list[str]:
    name, far, sam = SHARPNESS_AA, "linf 32/255 AA", "sam,rho=0.4"
    gains = {row: difference(name, row, far).mean for row in two_pass()}
    for row in table(name).rows:  # "none gains more than SAM beyond chance"
        if not row.name.startswith(("at,", "sam,rho=0.4")):
            for column in (far, "l2 128/255 AA"):
                assert not is_beyond_chance(name, *lead(name, row.name, sam, column))
    at, smooth = "at,norm=linf,eps=4", "label_smoothing,alpha=0.4"
    free = ("st,training.epochs=40", "swa,start=0.75", "ema,decay=0.9")
    little = max(difference(name, row, far).mean for row in free)
    (trained,) = [row for row in table(name).rows if row.name == at]
    return [
        f"at l-inf 32/255 the two-pass methods add {min(gains.values()):.1f} to "
        f"{max(gains.values()):.1f} points over standard training, SAM "
        f"{gain(name, sam, far)}",
        f"Label smoothing, which is free, adds {gain(name, smooth, far)} there, twice "
        f"the epochs or an average of weights at most {little:.1f}",
        f"adds {gain(name, at, far)}, at {trained.passes:.2f} times the passes",
    ]


def grid_ends_in_words() -> list[str]:
    """Of the small CIFAR-10: how many settings were chosen from an end of the grid."""
    tried = {row.name for row in table("sharpness/cifar10-small-grid/table").rows}
    strengths = runpy.run_path(str(ROOT / "configs/sharpness.py"))["STRENGTHS"]
    rows = {row.name for row in table(REAL).rows}
    low = high = 0
    for template, values in strengths.items():
        names = [template.format(value) for value in values]
        names = [name for name in names if name in tried]
        low, high = low + (names[0] in rows), high + (names[-1] in rows)
    ends = f"for {low + high} of the {len(strengths)} the best setting is at an end"
    return [f"{ends} of that grid, for {low} at the lower one"]


def real_images_in_words() -> list[str]:
    near, far = "linf 1/255", "linf 2/255"
    rows = ("sam,rho=0.2", "swa,start=0.25", "sam,rho=0.8,start=0.8")
    rows += ("label_smoothing,alpha=0.2",)
    sam, swa, late, smooth = (
        [gain(REAL, row, column) for column in (far, near, "natural")] for row in rows
    )
    at, longer = "at,norm=linf,eps=0.25", "st,training.epochs=20"
    assert not difference(REAL, at, "natural").significant
    for column in (near, far, "natural"):  # README: the average "gives as much"
        apart, error = lead(REAL, rows[1], rows[0], column)
        assert apart > -error
    looksam, esam = (
        mean(REAL, f"{name},rho=0.1", "natural") for name in ("looksam", "esam")
    )
    return [
        f"SAM adds {sam[0]} points at l-inf 2/255, {sam[1]} at 1/255 and {sam[2]} of "
        "natural accuracy",
        f"SWA from the first quarter on adds {swa[0]}, {swa[1]} and {swa[2]} at no "
        f"price, late SAM {late[0]}, {late[1]} and {late[2]} at 1.2 times the passes",
        f"Label smoothing adds {smooth[0]}, {smooth[1]} and {smooth[2]}",
        f"Twice the epochs add {gain(REAL, longer, 'natural')} of natural accuracy and "
        f"{gain(REAL, longer, far)} at l-inf 2/255",
        f"adds {gain(REAL, at, far)} and {gain(REAL, at, near)}, and "
        f"{gain(REAL, at, 'natural')} of natural accuracy",
        f"hardly learns at this learning rate ({looksam:.1f} %)",
        f"learns slowly ({esam:.1f} %)",
        *real_again_in_words(*rows, longer, at),
        *real_under_autoattack_in_words(*rows, at),
    ]


def real_again_in_words(*rows: str) -> list[str]:
    far, natural = (
        [gain(REAL_AGAIN, row, column) for row in rows]
        for column in ("linf 2/255", "natural")
    )
    sam, swa, late, smooth, longer, at = zip(far, natural, strict=True)
    return [
        f"SAM adds {sam[0]} points at l-inf 2/255 and {sam[1]} of natural accuracy, "
        f"SWA {swa[0]} and {swa[1]}, late SAM {late[0]} and {late[1]}, label smoothing "
        f"{smooth[0]} and {smooth[1]}, twice the epochs {longer[0]} and {longer[1]}, "
        f"adversarial training {at[0]} and {at[1]}",
    ]


def real_under_autoattack_in_words(
    sam: str, swa: str, late: str, smooth: str, at: str
) -> list[str]:
    name, far = REAL_AA, "linf 2/255"
    esam, awp, longer = "esam,rho=0.1", "awp,gamma=0.005", "st,training.epochs=20"
    rows = [row.name for row in table(name).rows]
    relatives = [row for row in two_pass(name) if row not in (sam, esam)]
    added = {row: difference(name, row, f"{far} AA").mean for row in relatives}
    assert max(added, key=lambda row: added[row]) == awp
    lost = [difference(name, row, "natural").mean for row in relatives]
    for row in rows:  # "neither beyond chance"
        apart, error = lead(name, row, sam, f"{far} AA")
        assert (apart > 0) == (row in (esam, at))
        assert not is_beyond_chance(name, apart, error)
    leads = [ahead(name, row, sam, f"{far} AA") for row in (esam, at)]
    apart, error = lead(name, swa, sam, f"{far} AA")
    assert apart > -error  # README: the average "gains as much"
    gains = [
        gain(name, row, f"{far} AA")
        for row in (sam, swa, late, smooth, esam, at, longer, "msam,rho=1")
    ]
    natural = [gain(name, row, "natural") for row in (sam, swa, late)]
    over = overstated(name, far).values()
    return [
        f"on {table(name).num_test} of the test images",
        f"At l-inf 2/255 SAM adds {gains[0]} points, SWA {gains[1]}, late SAM "
        f"{gains[2]} and label smoothing {gains[3]}",
        f"The other methods of two passes add {min(added.values()):.1f} to "
        f"{max(added.values()):.1f}, AWP most",
        f"ESAM, which has learned little ({mean(name, esam, 'natural'):.1f} % "
        f"natural), adds {gains[4]} and adversarial training {gains[5]}; they are "
        f"ahead of SAM by {leads[0]} and {leads[1]}, with three seeds neither beyond "
        "chance",
        f"Twice the epochs add {gains[6]}, MSAM {gains[7]}",
        f"PGD orders the {len(rows)} rows almost as AutoAttack does (rank correlation "
        f"{agreement(name, far):.2f}) and overestimates each of them, by "
        f"{min(over):.1f} to {max(over):.1f} points",
        f"On these images of natural accuracy SAM adds {natural[0]}, SWA {natural[1]}, "
        f"late SAM {natural[2]} and the other methods of two passes {min(lost):.1f} to "
        f"{max(lost):.1f}",
        *real_in_l2_in_words(sam, swa, late, smooth, at),
        *real_at_l2_16_in_words(sam, swa, late, smooth, at),
    ]


def real_in_l2_in_words(sam: str, *others: str) -> list[str]:
    name, column = REAL_AA, "l2 32/255"
    gains = [gain(name, row, f"{column} AA") for row in (sam, *others)]
    relatives = [row for row in two_pass(name) if row not in (sam, "esam,rho=0.1")]
    added = [difference(name, row, f"{column} AA").mean for row in relatives]
    rows = [row.name for row in table(name).rows if row.differences]
    found = {row: difference(name, row, f"{column} AA") for row in rows}
    beyond = {row for row in rows if found[row].significant and found[row].mean > 0}
    masked, on = "ssam,mask=dynamic,rho=0.1", "sam_on,rho=0.25"
    assert beyond == {masked, on}
    for row in (sam, others[0]):  # README: "leaves neither a gain in l2"
        assert found[row].mean < 0
    at = others[-1]
    for row in rows:  # "alone"
        if row != sam:
            apart, error = lead(name, row, sam, f"{column} AA")
            is_ahead = apart > 0 and is_beyond_chance(name, apart, error)
            assert is_ahead == (row == at)
    over = overstated(name, column).values()
    return [
        f"SAM adds {gains[0]} points, SWA {gains[1]}, late SAM {gains[2]}, label "
        f"smoothing {gains[3]} and the other methods of two passes {min(added):.1f} to "
        f"{max(added):.1f}",
        f"SSAM with a dynamic mask ({gain(name, masked, f'{column} AA')}) and SAM-ON "
        f"({gain(name, on, f'{column} AA')}) gain beyond chance, two of {len(rows)} "
        "comparisons",
        f"adds {gains[4]}, and it alone is ahead of SAM beyond chance, by "
        f"{ahead(name, at, sam, f'{column} AA')}",
        f"overestimates the rows by {min(over):.1f} to {max(over):.1f} points (rank "
        f"correlation {agreement(name, column):.2f})",
    ]


def real_at_l2_16_in_words(*rows: str) -> list[str]:
    column = "l2 16/255 AA"
    gains = [gain(REAL_L2, row, column) for row in rows]
    for row in rows:  # "beyond chance"
        assert not difference(REAL_L2, row, column).significant
    return [
        f"At l2 16/255, measured for {COUNTS[len(table(REAL_L2).rows)]} of the rows",
        f"SAM {gains[0]}, SWA {gains[1]}, late SAM {gains[2]}, label smoothing "
        f"{gains[3]}, adversarial training {gains[4]}",
    ]


def family_in_words() -> list[str]:
    sam, fast, free = "sam,rho=0.4", "fgsm_rs,eps=8", "free,eps=16,m=4"
    at, near, far = "at,norm=linf,eps=16", "linf 16/255", "linf 32/255"
    natural = {round(mean(FAMILY, row, "natural"), 1) for row in (sam, fast)}
    assert len(natural) == 1
    passes = {row.name: row.passes or 0.0 for row in table(FAMILY).rows}
    assert passes[free] == 1
    assert round(passes[at] / passes[fast]) == 5

    quick, replayed = (
        [ahead(FAMILY, row, sam, column) for column in (near, far)]
        for row in (fast, free)
    )
    shares = [
        100 * difference(FAMILY, row, near).mean / difference(FAMILY, at, near).mean
        for row in (fast, sam)
    ]
    return [
        f"({natural.pop():.1f} %) FGSM-RS at 8/255 costs {passes[fast]:.2f} passes "
        f"where SAM costs {passes[sam]:g}, and is ahead of SAM by {quick[0]} "
        f"points at l-inf 16/255 and by {quick[1]} at l-inf 32/255",
        f"it has {shares[0]:.0f} % at a fifth of the price, SAM {shares[1]:.0f} %",
        f"is ahead of SAM by {replayed[0]} and {replayed[1]}",
        *under_autoattack_in_words(sam, fast, free),
    ]


def under_autoattack_in_words(sam: str, fast: str, free: str) -> list[str]:
    far, smooth = "linf 32/255", "label_smoothing,alpha=0.4"

    def both(row: str) -> str:
        pgd, strong = (gain(FAMILY_AA, row, f"{far}{x}") for x in ("", " AA"))
        return f"{pgd} points at l-inf 32/255 under PGD and {strong} under AutoAttack"

    apart = [ahead(FAMILY_AA, row, sam, f"{far} AA") for row in (fast, free)]
    behind, error = lead(FAMILY_AA, smooth, sam, f"{far} AA")
    assert behind < -2 * error

    at = "at,norm=linf,eps=16"
    smoothed = f"{at}+label_smoothing,alpha=0.1"
    mart, single = "mart,norm=linf,eps=16,beta=5", "nfgsm,eps=32"
    over = overstated(FAMILY_AA, far)
    ranked = sorted(over.values(), reverse=True)
    assert ranked[:2] == [over[smooth], over["st"]]
    passes = {row.name: row.passes or 0.0 for row in table(FAMILY_AA).rows}
    strong = [mean(FAMILY_AA, row, f"{far} AA") for row in (single, at[:-2] + "32")]
    on_top = [ahead(FAMILY_AA, smoothed, at, f"{far}{x}") for x in ("", " AA")]
    lost = [ahead(FAMILY_AA, at, mart, f"{far}{x}") for x in ("", " AA")]
    round_ball, of_ball = "l2 128/255", "at,norm=l2,eps=128"
    rounded = overstated(FAMILY_AA, round_ball).values()
    there = f"{round_ball} AA"
    apart_there = [
        ahead(FAMILY_AA, *rows, there)
        for rows in ((of_ball, at), ("nfgsm,eps=16", single))
    ]
    return [
        f"At l2 128/255 PGD overestimates all of them, by {min(rounded):.1f} to "
        f"{max(rounded):.1f} points (rank correlation "
        f"{agreement(FAMILY_AA, round_ball):.2f})",
        "Adversarial training in that ball keeps "
        f"{mean(FAMILY_AA, of_ball, there):.1f} %, {apart_there[0]} points more than "
        "at l-inf 16/255",
        f"N-FGSM at l-inf 32/255 keeps {apart_there[1]} less than at 16/255",
        f"PGD orders the {len(over)} almost as AutoAttack does at l-inf 32/255 "
        f"(rank correlation {agreement(FAMILY_AA, far):.2f}), but overestimates label "
        f"smoothing by {ranked[0]:.1f} points, ST by {ranked[1]:.1f} and the others by "
        f"{ranked[-1]:.1f} to {ranked[2]:.1f}",
        f"Beside adversarial training label smoothing adds {on_top[0]} points under "
        f"PGD and {on_top[1]} under AutoAttack",
        f"N-FGSM at 32/255 keeps {strong[0]:.1f} % for {passes[single]:.2f} passes, "
        f"adversarial training at that radius {strong[1]:.1f} % for {passes[at]:.2f}",
        f"MART is behind adversarial training by {lost[0]} under PGD and {lost[1]} "
        "under AutoAttack",
        f"on {table(FOUR_AA).num_test} of the test images",
        f"Label smoothing adds {both(smooth)}",
        f"SAM adds {both(sam)}".replace(" points at l-inf 32/255 under PGD", ""),
        f"stay ahead of SAM by {apart[0]} and {apart[1]}",
    ]


def overstated(name: str, column: str) -> dict[str, float]:
    """By how many points PGD's accuracy is above AutoAttack's, by row."""
    return {
        row.name: mean(name, row.name, column) - mean(name, row.name, f"{column} AA")
        for row in table(name).rows
    }


def agreement(name: str, column: str) -> float:
    """The rank correlation of PGD's and AutoAttack's means over the rows."""
    weak, strong = (
        [mean(name, row.name, c) for row in table(name).rows]
        for c in (column, f"{column} AA")
    )
    found: Any = stats.spearmanr(weak, strong)
    return float(found.statistic)


def flatness_in_words() -> list[str]:
    own, other = flatness("sharpness/digits"), flatness("adversarial/digits")
    flat = [name for name, one in QUANTITIES.items() if one.kind == "flatness"]

    def average(found: findings.Explanation, row: str, name: str) -> float:
        return statistics.fmean(
            x.values[name] or 0.0 for x in found.runs if x.row == row
        )

    def rising(found: findings.Explanation, name: str, column: str) -> bool | None:
        """Whether accuracy rises with a measure; None where that is not sure."""
        known = found.correlations[name][column]
        return known.rho is not None and known.rho > 0 if known.is_sure else None

    for found in (own, other):
        for column in found.columns[1:]:
            assert rising(found, "distance_linf", column)
            assert rising(found, "linearity_error", column) is False
    far, worst = "linf 32/255 AA", ("worst", "worst_adaptive")
    for name in flat:
        values = {run.row: average(own, run.row, name) for run in own.runs}
        assert max(values, key=values.__getitem__) == "label_smoothing,alpha=0.4"
        if name != "relative_flatness":
            assert rising(own, name, far) is (False if name in worst else None)
            assert rising(own, name, "linf 32/255") is None  # "PGD hides that"
    for found in (own, other):
        assert rising(found, "relative_flatness", far)
    assert all(rising(other, name, far) is None for name in worst)
    for name in ("logit_norm", "logit_gap"):
        assert rising(other, name, far) is False
    st, sam = (
        [average(own, row, name) for name in ("worst", "trace")]
        for row in ("st", "sam,rho=0.4")
    )
    assert round(st[0] / sam[0]) == 6
    at = average(other, "at,norm=linf,eps=16", "worst")
    counts = [(len(x.runs), len({run.row for run in x.runs})) for x in (own, other)]
    return [
        *("{} of {} methods".format(*found) for found in counts),
        f"is a sixth of ST's ({sam[0]:.4f} and {st[0]:.4f})",
        f"while its trace is the same ({sam[1]:.2f} and {st[1]:.2f})",
        f"is as flat as SAM ({at:.4f}) without",
    ]


def cheap_in_words() -> list[str]:
    near, far, sam, at = "linf 1/255", "linf 2/255", "sam,rho=0.2", "at,norm=linf,eps=1"
    fast = {eps: f"fgsm_rs,eps={eps}" for eps in ("0.25", "0.5", "1")}
    passes = {row.name: row.passes or 0.0 for row in table(CHEAP).rows}
    assert passes["free,eps=1,m=4"] == 1
    for row in fast.values():
        for column in (near, far, "natural"):
            both = (cell(CHEAP, name, column).values for name in (row, sam))
            assert all(ours > theirs for ours, theirs in zip(*both, strict=True))

    def gains(row: str) -> list[str]:
        return [gain(CHEAP, row, column) for column in (near, far, "natural")]

    own, half, whole, late, trades = map(
        gains,
        (sam, fast["0.5"], at, f"{at},start=0.8", "trades,norm=linf,eps=1,beta=1"),
    )
    quarter = [
        ahead(CHEAP, fast["0.25"], sam, column) for column in (near, far, "natural")
    ]
    shares = [
        100 * difference(CHEAP, row, far).mean / difference(CHEAP, at, far).mean
        for row in (fast["0.5"], sam)
    ]
    there, again, here = (
        gain(name, "label_smoothing,alpha=0.2", far)
        for name in (REAL, REAL_AGAIN, CHEAP)
    )
    free = mean(CHEAP, "free,eps=1,m=4", "natural")
    return [
        f"SAM adds {own[0]} points at l-inf 1/255, {own[1]} at 2/255 and {own[2]} of "
        f"natural accuracy, for {passes[sam]:g} passes",
        f"FGSM-RS at 0.5/255 adds, in the same order, {half[0]}, {half[1]} "
        f"and {half[2]}, for {passes[fast['0.5']]:.2f}",
        f"ahead of SAM by {quarter[0]}, {quarter[1]} and {quarter[2]}",
        f"adds {whole[0]}, {whole[1]} and {whole[2]}, for {passes[at]:.2f}",
        f"{late[0]}, {late[1]} and {late[2]}, for {passes[at + ',start=0.8']:.2f}",
        f"TRADES with a small beta {trades[0]}, {trades[1]} and {trades[2]}, for "
        f"{passes['trades,norm=linf,eps=1,beta=1']:g}",
        f"FGSM-RS has {shares[0]:.0f} % and SAM {shares[1]:.0f} %",
        f"learns too little ({free:.1f} % natural)",
        f"adds {there} at l-inf 2/255 there, {again} when trained again, and {here} "
        "here",
        *larger_radii_in_words(at),
        *cheap_under_autoattack_in_words(fast["0.5"], sam),
    ]


def cheap_under_autoattack_in_words(fast: str, sam: str) -> list[str]:
    near = "linf 1/255"
    strong, over = f"{near} AA", overstated(CHEAP_AA, near)
    left = [mean(CHEAP_AA, row, strong) for row in ("st", sam, fast)]
    apart = [ahead(CHEAP_AA, row, sam, strong) for row in (fast, "at,norm=l2,eps=32")]
    smooth = gain(CHEAP_AA, "label_smoothing,alpha=0.2", strong)
    assert over["label_smoothing,alpha=0.2"] == max(over.values())
    return [
        f"on {table(CHEAP_AA).num_test} of the test images at l-inf 1/255, the picture "
        f"is the same. PGD orders the {len(over)} rows almost as AutoAttack does (rank "
        f"correlation {agreement(CHEAP_AA, near):.2f}) and overestimates no row by "
        f"more than {max(over.values()):.1f} points, label smoothing most",
        f"leaves standard training {left[0]:.1f} %, SAM {left[1]:.1f} % and FGSM-RS at "
        f"0.5/255 {left[2]:.1f} %",
        f"FGSM-RS is ahead of SAM by {apart[0]}, adversarial training within l2 32/255 "
        f"by {apart[1]}",
        f"SAM adds {gain(CHEAP_AA, sam, strong)} to standard training, label smoothing "
        f"{smooth}",
    ]


def larger_radii_in_words(at: str) -> list[str]:
    far, rows = "linf 2/255", {row.name: row for row in table(CHEAP).rows}
    said = [
        f"{mean(CHEAP, row, 'natural'):.1f} % natural and {mean(CHEAP, row, far):.1f} %"
        for row in ("fgsm_rs,eps=2", "at,norm=linf,eps=2")
    ]
    passes = [rows[row].passes for row in ("fgsm_rs,eps=2", at)]
    largest = [name for name in rows if re.search(r"eps=8(,|\+|$)", name)]
    natural, robust = (
        sorted(mean(CHEAP, row, column) for row in largest)
        for column in ("natural", far)
    )
    assert robust[-1] < mean(CHEAP, at, far)
    best = "at,norm=l2,eps=32"
    for column in ("linf 1/255", "l2 16/255", "l2 32/255"):
        assert best in table(CHEAP).best(column)
    whole = [mean(CHEAP, best, column) for column in ("natural", "linf 1/255")]
    cheap = [
        ahead(CHEAP, best, "fgsm_rs,eps=0.5", column)
        for column in ("l2 16/255", "l2 32/255", "linf 2/255")
    ]
    signs = [
        ahead(CHEAP, "at,norm=linf,eps=8", row, far)
        for row in ("mart,norm=linf,eps=8,beta=5", "at,norm=linf,eps=8+awp,gamma=0.005")
    ]
    return [
        f"it keeps {whole[0]:.1f} % natural and {whole[1]:.1f} % at l-inf 1/255, and "
        f"is ahead of FGSM-RS at 0.5/255 by {cheap[0]} at l2 16/255, {cheap[1]} at "
        f"32/255 and {cheap[2]} at l-inf 2/255",
        f"MART is behind adversarial training by {signs[0]} points at l-inf 2/255, AWP "
        f"by {signs[1]}",
        f"Trained at 2/255 FGSM-RS keeps {said[0]} at l-inf 2/255 for {passes[0]:.2f} "
        f"passes, adversarial training {said[1]} for {passes[1]:.2f}",
        f"the {COUNTS[len(largest)]} rows keep {natural[0]:.1f} to {natural[-1]:.1f} % "
        f"natural and {robust[0]:.1f} to {robust[-1]:.1f} % at l-inf 2/255, where "
        f"adversarial training at 1/255 keeps {mean(CHEAP, at, far):.1f} %",
    ]


def theory_in_words() -> list[str]:
    """How the shift that is printed for small rho errs, over the grid."""
    large = small = total = 0
    for point in stored("theory/theory.json")["points"]["sam"]:
        shift, error = point["w"] - point["standard"], point["error"]
        if error is None or error > 0.01 * shift:
            continue
        total += 1
        expected = point["standard"] * point["radius"] ** 2 / (3 * point["d"])
        large += expected > shift + 2 * error
        small += expected < shift - 2 * error
        bound = point["w"] * point["radius"] ** 2 / (3 * point["d"])
        assert bound >= shift - 2 * error
    lines = stored("theory/theory.json")["trained"]
    assert all("memory" in line for line in lines)  # convergence was looked at
    moved = [
        x["radius"] for x in lines if x["method"] == "sam" and x["agrees"] == "yes"
    ]
    return [
        f"too large at {large} of {total} points, and too small at {small}",
        f"Of the trained SAM runs, only that at rho = {moved[0]:g} moves the weight",
    ]


def sanity_in_words() -> list[str]:
    allowed = [f"{allowance(n)} of {n:,}" for n in (50, 256, 1000, 10_000)]
    # Zero gradients; by ball steps, restarts, radius, Square, transfer, logit scale.
    checks = 1 + 2 * 6
    rate = sum(
        math.comb(256, k) * 0.01**k * 0.99 ** (256 - k)
        for k in range(allowance(256) + 1, 257)
    )
    return [
        f"{allowed[0]} images, {', '.join(allowed[1:])}",
        f"makes {checks} of them, and if all were at the allowed rate, with 256 images "
        f"({100 * rate:.2f} % each), {100 * (1 - (1 - rate) ** checks):.0f} % of such",
    ]


def provenance_in_words() -> list[str]:
    """Which files come from a commit with changes, and whose networks they judge."""
    *names, last = sorted(
        str(path.relative_to(RESULTS))
        for path in RESULTS.rglob("*.json*")
        if re.search(r'"commit": "\w+\+changes"', path.read_text())
    )
    return [
        f"so were made {', '.join(names)} and {last}.",
        *([] if same_networks() else ["rows and settings are the same, the numbers"]),
    ]


def same_networks() -> bool:
    """Whether PGD and AutoAttack judged the digits networks of the first table."""
    column = "linf 32/255"
    values = [cell(name, "st", column).values for name in (DIGITS_AA, DIGITS)]
    return values[0] == values[1][: len(values[0])]


SENTENCES = {
    "README.md": [digits_in_words, relatives_in_words],
    "docs/evaluation.md": [example_in_words],
    "docs/reference.md": [reference_in_words],
    "docs/results.md": [full_size_in_words, small_in_words, autoattack_in_words],
    "docs/speed.md": [speed_in_words],
    "docs/adversarial.md": [family_in_words, cheap_in_words],
    "docs/sharpness.md": [sharpness_in_words, real_images_in_words, grid_ends_in_words],
    "docs/flatness.md": [flatness_in_words],
    "docs/theory.md": [theory_in_words],
    "docs/sanity.md": [sanity_in_words],
    "results/README.md": [provenance_in_words],
}


@functools.cache
def sentences(page: str) -> tuple[str, ...]:
    return tuple(said for make in SENTENCES.get(page, ()) for said in make())


# --- the pages ------------------------------------------------------------------------


def problems(page: str, text: str) -> list[str]:
    """What a page says that is not stored: what it must read, each."""
    measured = [rows for rows in tables(text) if tuple(rows[0]) not in WORDS]
    found = []
    if len(measured) != len(held(page)):
        found.append(f"{len(measured)} tables with numbers, {len(held(page))} are held")
    for rows, expected in zip(measured, held(page), strict=False):
        if rows != expected:
            found += ["| " + " | ".join(row) + " |" for row in expected]
    return found + wrong_sentences(page, text)


def wrong_sentences(page: str, text: str) -> list[str]:
    squeezed = " ".join(text.split())
    return [said for said in sentences(page) if said not in squeezed]


@pytest.mark.parametrize("page", [*PAGES, *(p for p in WRITTEN if "profile" not in p)])
def test_a_page_says_what_is_stored(page):
    assert problems(page, (ROOT / page).read_text()) == []


@pytest.mark.parametrize(
    ("page", "begin", "least"),
    [
        ("README.md", "\n| method", 100),
        ("docs/results.md", "\n| method", 200),
        ("docs/speed.md", "\n| batch", 100),
        ("docs/theory.md", "**Section 4 against", 200),
    ],
)
def test_no_digit_of_a_result_can_change_unnoticed(page, begin, least):
    text = (ROOT / page).read_text()
    first = text.index(begin)
    rows = [m.span() for m in re.finditer(r"^\|.*$", text[first:], re.MULTILINE)]
    cells = {"| " + " | ".join(row) + " |" for found in held(page) for row in found[1:]}
    changed = 0
    for start, end in rows:
        line = text[first + start : first + end]
        if line not in cells:
            continue
        for i, character in enumerate(line):
            if character.isdigit():
                place = first + start + i
                other = str(9 - int(character))
                assert problems(page, text[:place] + other + text[place + 1 :])
                changed += 1
    assert changed > least


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/speed.md"])
def test_no_digit_of_a_sentence_can_change_unnoticed(page):
    text = " ".join((ROOT / page).read_text().split())
    for said in sentences(page):
        assert text.count(said) == 1
        digits = [i for i, character in enumerate(said) if character.isdigit()]
        for i in digits:
            other = said[:i] + str(9 - int(said[i])) + said[i + 1 :]
            assert wrong_sentences(page, text.replace(said, other)) == [said]


@pytest.mark.parametrize("name", TABLES)
def test_a_tables_json_is_what_its_seeds_give(name):
    content, again = stored(f"{name}.json"), json.loads(to_json(table(name)))
    for kind in ("rows", "runs"):
        for now, then in zip(again[kind], content[kind], strict=True):
            assert now | then == now  # a later version may keep more
    assert again["missing"] == content["missing"] == []


@pytest.mark.parametrize(
    ("name", "grid", "settings"),
    [("sharpness", "grid", 4), ("cifar10_small", "cifar10-small-grid", 3)],
)
def test_the_sharpness_rows_are_the_best_of_their_grid(name, grid, settings):
    config = ROOT / "configs" / f"{name}.py"
    strengths = runpy.run_path(str(config.with_stem("sharpness")))["STRENGTHS"]
    tried = {row.name: row for row in table(f"sharpness/{grid}/table").rows}

    def score(row: str) -> float:
        cells = tried[row].cells.values()
        return statistics.fmean(cell.mean or 0.0 for cell in cells)

    best = [
        max((row.format(value) for value in values[:settings]), key=score)
        for row, values in strengths.items()
    ]
    chosen = set(config_files.load_rows(str(config)))
    assert chosen & tried.keys() - {"st"} == set(best)


def test_the_leaderboard_is_that_of_its_claims():
    assert (RESULTS / "leaderboard/leaderboard.md").read_text() == board()


def test_the_papers_numbers_are_those_of_the_configs():
    for row in stored(f"{FULL}.json")["rows"]:
        numbers = {c: found["paper"] for c, found in row["cells"].items()}
        assert numbers == paper("cifar10.py")[row["name"]]
    assert not table(SMALL).has_paper  # another experiment
    config = stored(f"{AT_FULL}/config.json")
    assert config["paper"] == paper("cifar10.py")[config["row"]]
    for name in ("cifar10.py", "cifar100.py"):
        assert [len(numbers) for numbers in paper(name).values()] == [5] * 12


def test_what_pages_say_without_a_number_holds():
    numbers, sam = paper("cifar10.py"), "sam,rho=0.4"
    for column in table(FULL).columns:  # "the paper's to half a point in every column"
        assert abs(mean(FULL, sam, column) - numbers[sam][column]) <= 0.5
    assert not difference(DIGITS, sam, "natural").mean < 0  # "at no cost"
    smooth = "label_smoothing,alpha=0.4"
    for column in table(SHARPNESS).columns:  # "is worth as much under this attack"
        apart, error = lead(SHARPNESS, smooth, sam, column)
        assert apart > -2 * error
    for path in RESULTS.rglob("sanity/*.json"):  # "seed 0 passes all checks"
        verdicts = json.loads(path.read_text())["verdicts"]
        assert verdicts["warning"] == verdicts["undecided"] == 0
    for column in ("linf 2/255", "linf 2/255 AA"):  # "chance or little beyond it"
        small = difference(SMALL_AA, "sam,rho=0.2", column)
        assert small.mean < 2.5 * (small.standard_error or 0)


def test_the_profile_adds_up():
    kernels = profile()
    total = kernels.pop("all")
    for i, whole in enumerate(total):
        assert abs(sum(x[i] for x in kernels.values()) - whole) <= 1
