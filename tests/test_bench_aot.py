"""Programs for devices that are not there: their kernels counted, their form held."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import textwrap

import helpers
import jax
import jax.numpy as jnp
import pytest
from test_attack_contract import ATTACKS, BALLS

from samrobust.experiments import configuration
from samrobust.experiments.entries import REGISTRIES
from samrobust.models import PreActResNet
from samrobust.studies.bench import aot
from samrobust.studies.bench.hlo import Shape, kernels
from samrobust.studies.bench.plan import Options, Task, plan
from samrobust.system.distributed import compiling_for

CIFAR = f"{helpers.ROOT}/configs/cifar10.py"
DIGITS = f"{helpers.ROOT}/configs/digits.py"

# A program as XLA's GPU compiler prints it, but for its length: ten runs of a body with
# a reduction, a convolution, and an update of one row of a buffer.
PROGRAM = textwrap.dedent("""
    HloModule jit_run, is_scheduled=true

    %add (a: f32[], b: f32[]) -> f32[] {
      %a = f32[] parameter(0)
      %b = f32[] parameter(1)
      ROOT %sum = f32[] add(%a, %b)
    }

    %fused_reduce (param_0: bf16[2,4,4,3]) -> f32[3] {
      %param_0 = bf16[2,4,4,3]{3,2,1,0} parameter(0)
      %wide = f32[2,4,4,3]{3,2,1,0} convert(%param_0)
      %zero = f32[] constant(0)
      ROOT %reduce = f32[3]{0} reduce(%wide, %zero), dimensions={0,1,2}, to_apply=%add
    }

    %fused_update (param_0.1: f32[100,3], param_1: f32[3], param_2: s32[]) -> f32[100,3] {
      %param_0.1 = f32[100,3]{1,0} parameter(0)
      %param_1 = f32[3]{0} parameter(1)
      %row = f32[1,3]{1,0} bitcast(%param_1)
      %param_2 = s32[] parameter(2)
      %none = s32[] constant(0)
      ROOT %new = f32[100,3]{1,0} dynamic-update-slice(%param_0.1, %row, %param_2, %none)
    }

    %body (carry: (s32[], bf16[2,4,4,3], bf16[3,3,3,3], f32[100,3])) -> (s32[]) {
      %carry = (s32[], bf16[2,4,4,3]{3,2,1,0}, /*index=2*/bf16[3,3,3,3]{3,2,1,0}, f32[100,3]{1,0}) parameter(0)
      %i = s32[] get-tuple-element(%carry), index=0
      %x = bf16[2,4,4,3]{3,2,1,0} get-tuple-element(%carry), index=1
      %k = bf16[3,3,3,3]{3,2,1,0} get-tuple-element(%carry), index=2
      %all = f32[100,3]{1,0} get-tuple-element(%carry), index=3
      %conv = (bf16[2,4,4,3]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), custom_call_target="__cudnn$convForward", metadata={op_name="calls=%nothing"}
      %y = bf16[2,4,4,3]{3,2,1,0} get-tuple-element(%conv), index=0
      %sums = f32[3]{0} fusion(%y), kind=kInput, calls=%fused_reduce
      %noted = f32[100,3]{1,0} fusion(%all, %sums, %i), kind=kLoop, calls=%fused_update
      ROOT %next = (s32[], bf16[2,4,4,3]{3,2,1,0}, bf16[3,3,3,3]{3,2,1,0}, f32[100,3]{1,0}) tuple(%i, %y, %k, %noted)
    }

    %done (state: (s32[], bf16[2,4,4,3], bf16[3,3,3,3], f32[100,3])) -> pred[] {
      %state = (s32[], bf16[2,4,4,3]{3,2,1,0}, bf16[3,3,3,3]{3,2,1,0}, f32[100,3]{1,0}) parameter(0)
      %limit = s32[] constant(10)
      %now = s32[] get-tuple-element(%state), index=0
      ROOT %less = pred[] compare(%now, %limit), direction=LT
    }

    %small (s: f32[3]) -> f32[3] {
      %s = f32[3]{0} parameter(0)
      ROOT %copied = f32[3]{0} copy(%s)
    }

    %large (t: f32[3]) -> f32[3] {
      %t = f32[3]{0} parameter(0)
      %first = f32[3]{0} copy(%t)
      ROOT %second = f32[3]{0} negate(%first)
    }

    ENTRY %main (p: (s32[], bf16[2,4,4,3], bf16[3,3,3,3], f32[100,3]), q: f32[3], w: pred[]) -> f32[3] {
      %p = (s32[], bf16[2,4,4,3]{3,2,1,0}, bf16[3,3,3,3]{3,2,1,0}, f32[100,3]{1,0}) parameter(0)
      %q = f32[3]{0} parameter(1)
      %w = pred[] parameter(2)
      %loop = (s32[], bf16[2,4,4,3]{3,2,1,0}, bf16[3,3,3,3]{3,2,1,0}, f32[100,3]{1,0}) while(%p), condition=%done, body=%body, backend_config={"known_trip_count":{"n":"10"}}
      ROOT %end = f32[3]{0} conditional(%w, %q, %q), branch_computations={%small, %large}
    }
    """)  # noqa: E501


def test_kernels_are_counted_by_kind_with_their_runs_and_bytes():
    found = {kernel.name: kernel for kernel in kernels(PROGRAM)}
    assert {k.name: (k.kind, k.runs, k.num_bytes) for k in found.values()} == {
        "conv": ("convolutions", 10, 2 * 96 * 2 + 81 * 2),
        "sums": ("reductions", 10, 96 * 2 + 3 * 4),
        # Of 100 rows one is written, and none read.
        "noted": ("loop fusions", 10, 3 * 4 + 3 * 4 + 4),
        # The larger branch.
        "first": ("rest", 1, 24),
        "second": ("rest", 1, 24),
    }
    assert found["conv"].outputs == (Shape("bf16", (2, 4, 4, 3)), Shape("u8", (0,)))
    assert found["sums"].opcodes == {"convert", "reduce"}


def test_a_collective_is_counted_once_by_what_a_device_brings():
    text = """
    HloModule jit_run

    ENTRY %main (p: f32[8,2], q: bf16[4]) -> f32[8,2] {
      %p = f32[8,2]{1,0} parameter(0)
      %q = bf16[4]{0} parameter(1)
      %begun = f32[8,2]{1,0} all-reduce-start(%p), channel_id=1
      %first = f32[8,2]{1,0} all-reduce-done(%begun)
      %both = (f32[8,2]{1,0}, bf16[4]{0}) all-reduce(%first, %q), channel_id=2
      ROOT %sum = f32[8,2]{1,0} get-tuple-element(%both), index=0
    }
    """
    found = kernels(textwrap.dedent(text))
    assert [(k.kind, k.num_bytes) for k in found] == [
        ("collectives", 64),
        ("collectives", 72),
    ]


def test_a_loop_runs_as_often_as_its_condition_says_or_once():
    unnoted = PROGRAM.replace("known_trip_count", "nothing")
    assert kernels(unnoted) == kernels(PROGRAM)
    unknown = unnoted.replace("direction=LT", "direction=NE")
    assert {kernel.runs for kernel in kernels(unknown)} == {1}


def test_an_asynchronous_copy_is_read_and_written_once():
    program = """
    ENTRY %main (x: f32[8]) -> f32[8] {
      %x = f32[8]{0} parameter(0)
      %start = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%x)
      ROOT %done = f32[8]{0:S(1)} copy-done(%start)
    }
    """
    (copy,) = kernels(textwrap.dedent(program))
    assert (copy.num_bytes, copy.outputs) == (64, (Shape("f32", (8,)),))


def test_the_counts_of_a_step_are_those_of_a_call_over_its_steps():
    counts = aot.counts_of(kernels(PROGRAM), num_steps=5)
    assert counts["kernels"] == {
        "reductions": 2,
        "loop fusions": 2,
        "convolutions": 2,
        "collectives": 0,
        "rest": 2 / 5,
    }
    assert counts["bytes"]["reductions"] == 2 * 204
    (body,) = counts["bodies"]
    assert (body["runs"], body["kernels"]["convolutions"]) == (2, 1)
    assert (body["kernels"]["rest"], body["bytes"]["reductions"]) == (0, 204)


def test_a_compiled_program_is_read_with_the_loops_in_its_loops():
    @jax.jit
    def program(x):
        def outer(_, x):
            x = jax.lax.fori_loop(0, 7, lambda _, x: jnp.sin(x @ x), x)
            return jnp.flip(jnp.cumsum(x, axis=0))

        return jax.lax.fori_loop(0, 3, outer, x)

    with helpers.usual_compilation():
        text = program.lower(jnp.ones((16, 16))).compile().as_text() or ""
    runs = {kernel.runs for kernel in kernels(text)}
    assert {3, 21} <= runs
    dot = next(k for k in kernels(text) if k.opcodes & {"dot", "custom-call"})
    assert (dot.runs, dot.num_bytes % 1024) == (21, 0)


# The command.


def test_without_a_compiler_for_the_device_the_command_says_what_installs_it(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(aot, "_is_installed", lambda _: False)
    for name, package in (("h200", r"samrobust[aot]"), ("v5e", r"samrobust[tpu]")):
        workdir = tmp_path / name
        assert helpers.main("bench", f"--aot={name}", f"--workdir={workdir}") != 0
        (line,) = capsys.readouterr().err.splitlines()
        assert f"got --aot='{name}'" in line
        assert f'pip install "{package}"' in line
        assert not workdir.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": ("unrolled",)}, "--measure"),
        ({"row": ("mart,beta=6",)}, "mart"),
    ],
)
def test_what_cannot_be_counted_is_refused_before_anything_compiles(options, message):
    with pytest.raises(ValueError, match=message):
        plan(Options(DIGITS, aot="h200", **options))


def test_rows_of_any_method_are_counted_beside_the_evaluation():
    rows = ("trades,norm=linf,eps=8,beta=6", "ema,decay=0.9")
    tasks = plan(Options(DIGITS, aot="h200", row=rows))
    steps = [task.row for task in tasks if task.kind == "step"]
    assert (tuple(steps), len(tasks)) == (rows, 3)
    flags = ("", "--xla_a=1")
    options = Options(DIGITS, aot="h200", row=("st",), xla_flags=flags)
    tasks = plan(dataclasses.replace(options, measure=("step",)))
    assert [task.xla_flags for task in tasks] == ["", "--xla_a=1"]


def test_a_deterministic_step_is_compiled_as_it_is_run():
    usual = helpers.make_config("st")
    config = helpers.make_config("st", {"training.deterministic": True})
    flag, given = "xla_gpu_deterministic_ops", {"xla_a": True}
    options = functools.partial(aot.compiler_options, options=given)
    for kind, of, name, wanted in (
        ("step", config, "h200", True),
        ("step", usual, "h200", False),
        ("step", config, "v5e", False),  # XLA has no other programs for TPUs
        ("evaluation", config, "h200", False),  # as in a run
    ):
        found = options(kind, of, name)
        assert (found.get(flag, False), found["xla_a"]) == (wanted, True)
        assert aot.TARGETS[name].options.items() <= found.items()
    off = aot.compiler_options("step", config, "h200", {flag: False})
    assert off[flag] is False


def test_what_was_counted_is_shown_and_written_and_a_failure_told(tmp_path):
    counts = aot.counts_of(kernels(PROGRAM), num_steps=5)
    found = counts | {"temporary_bytes": 2e9, "compile_seconds": 3.0}
    tasks = [
        Task("step", "st", "st", 8, "float32"),
        Task("evaluation", "", "st", 8, ""),
    ]
    outcomes = {tasks[0]: [found], tasks[1]: [{"error": "exit code 1: no memory"}]}
    paths = aot.write_counts(outcomes, "h200", tmp_path)
    (row, failed) = json.loads(paths[0].read_text())["rows"]
    assert (row["row"], row["kernels"]["convolutions"]) == ("st", 2)
    assert failed["error"] == "exit code 1: no memory"
    shown = paths[1].read_text()
    assert "| st | 8 | float32 | 6 | 0.00 | 2.00 | 0 | 0.0 | 3 |" in shown
    assert "loop x 2" in shown
    assert "failed: evaluation: exit code 1: no memory" in shown


# The form of the programs, with no compiler of the device.

METHODS = [
    "st",
    "sam,rho=0.2",
    "asam,rho=0.2",
    "at,norm=l2,eps=16",
    "at,norm=linf,eps=8+awp,gamma=0.005",
    "trades,norm=linf,eps=8,beta=6+ema,decay=0.9",
    "asam_davda,rho=2+swa,start=0.75",
    "gsam,rho=0.2",
    "friendly_sam,rho=0.2",
    "looksam,rho=0.1",
    "esam,rho=0.1",
    "sam_on,rho=0.5",
    "fisher_sam,rho=0.1",
    "fsam,rho=0.1",
    "ssam,mask=fisher,rho=0.1",
    "msam,rho=0.3",
    "entropy_sgd,gamma=0.03",
    "mart,norm=linf,eps=8,beta=5+awp,gamma=0.005",
    "fgsm_rs,eps=8+label_smoothing,alpha=0.1+swa,start=0.5",
    "nfgsm,eps=8+sam,rho=0.2",
    "free,eps=8,m=8",
    "rwp,gamma=0.01",
    "dynamic,eps=8",
    "cfa,eps=8",
    "cfa_trades,eps=8,beta=6+sam,rho=0.2+fawa,threshold=0.1",
    "at,norm=linf,eps=8+generalist,beta=0.4",
]


def lower_everywhere(traced):
    return traced.lower(lowering_platforms=("cuda", "tpu"))


def test_every_method_is_among_those_that_are_lowered():
    names = {part.split(",")[0] for row in METHODS for part in row.split("+")}
    assert {name for registry in REGISTRIES for name in registry} <= names


@pytest.mark.parametrize("row", METHODS)
def test_a_step_of_every_method_lowers_for_gpus_and_tpus(row):
    held_out = {"data.validation_size": 64} if "fawa" in row else {}
    rounds = {"entropy_sgd.inner_steps": 4} if "entropy" in row else {}
    fields = {"model.dtype": "bfloat16", **held_out, **rounds}
    config = helpers.make_config(row, fields)
    with compiling_for(jax.devices()[:1]):
        traced, num_steps = aot.step_program(config)
    assert num_steps == 1
    lower_everywhere(traced)


def test_a_step_over_groups_lowers_for_gpus_and_tpus():
    groups = {"sam.m": 16, "model.batch_norm_group": 16}
    config = helpers.make_config("sam,rho=0.2", groups)
    with compiling_for(jax.devices()[:1]):
        lower_everywhere(aot.step_program(config)[0])


def test_the_evaluation_lowers_for_gpus_and_tpus():
    with compiling_for(jax.devices()[:1]):
        lower_everywhere(aot.evaluation_program(helpers.make_config())[0])


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_lowers_for_gpus_and_tpus(name):
    attack = ATTACKS[name](BALLS["linf"])

    def logits_fn(images):
        return images.reshape(len(images), -1)[:, :4]

    images = jax.ShapeDtypeStruct((2, 2, 2, 1), jnp.float32)
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    jitted = jax.jit(lambda x, y, key: attack(logits_fn, x, y, key=key))
    lower_everywhere(jitted.trace(images, labels, keys))


def test_a_row_of_any_method_is_built_and_checked_without_asking_for_a_device():
    """Processes that join one another must do so before the first of them asks."""
    held_out = ["--config.data.validation_size=64"]
    script = textwrap.dedent(f"""
        from jax._src import xla_bridge
        from samrobust.experiments import configuration
        for row in {METHODS}:
            configuration.load_config({DIGITS!r} + ":" + row, {held_out})
            assert not xla_bridge._backends, row
        """)
    subprocess.run([sys.executable, "-c", script], check=True, cwd=helpers.ROOT)


# Compiled for an H200.

# JAX itself must not look for the device: as in the processes of the command.
ON_CPU = os.environ.get("JAX_PLATFORMS") == "cpu"
has_compiler = pytest.mark.skipif(
    not ON_CPU or not any(map(aot._is_installed, aot.TARGETS["h200"].plugins)),
    reason='wants JAX_PLATFORMS=cpu and pip install "samrobust[aot]"',
)
GROUPS = (
    *(("sam.m", 32), ("model.batch_norm_group", 32)),
    ("training.drop_remainder", True),
)
# Kernels and GB of a step of 26 in a call, or of a batch evaluated, that may not be
# exceeded: PreActResNet-18 in bfloat16 on 128 images, 500 in an evaluation. Of two
# seeds in a program, one's share.
CEILINGS = {
    "st": ("st", (), 265, 2.7),
    "two seeds": ("st", (), 260, 2.7),
    "sam": ("sam,rho=0.2", (), 565, 5.3),
    "at": ("at,norm=linf,eps=8", (), 2_110, 23.8),
    "m-sharpness": ("sam,rho=0.2", GROUPS, 3_030, 12.1),
    "trades": ("trades,norm=linf,eps=8,beta=6", (), 1_630, 22.8),
    "awp": ("at,norm=linf,eps=8+awp,gamma=0.005", (), 2_720, 26.5),
    "evaluation": ("st", (), 4_500, 258.0),
}


@functools.cache
def compiled_for_h200(name):
    """The kernels of a program of `CEILINGS`, and the number of its steps."""
    row, overrides, *_ = CEILINGS[name]
    given = [f"--config.{field}={value}" for field, value in overrides]
    given.append("--config.model.dtype=bfloat16")
    config = configuration.load_config(f"{CIFAR}:{row}", given)
    evaluates = name == "evaluation"
    seeds = 2 if name == "two seeds" else 1
    steps = functools.partial(aot.step_program, seeds=seeds)
    program = aot.evaluation_program if evaluates else steps
    with helpers.usual_compilation(), compiling_for(aot.devices_of("h200")):
        traced, num_steps = program(config)
        compiled = traced.lower().compile(dict(aot.TARGETS["h200"].options))
    assert num_steps == (1 if evaluates else 26 * seeds)
    return kernels(compiled.as_text() or ""), num_steps


def wide_activations(found):
    """The float32 results as large as a feature map of PreActResNet-18, in any shape.

    Gradients and updates of kernels may be: what has the size of one is none.
    """
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    init = functools.partial(PreActResNet().init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), images)["params"]
    smallest, sizes = 128 * 4 * 4 * 512, {leaf.size for leaf in jax.tree.leaves(params)}
    return {
        shape.dims
        for kernel in found
        for shape in kernel.outputs
        if shape.dtype == "f32" and math.prod(shape.dims) >= smallest
        if math.prod(shape.dims) not in sizes
    }


def test_an_activation_in_float32_is_seen_whatever_its_shape():
    (kernel,) = (each for each in kernels(PROGRAM) if each.name == "sums")
    for dims, is_seen in (
        ((128, 32, 32, 64), True),
        ((131072, 64), True),
        ((128, 512, 4, 4), True),
        ((64 * 128 * 32 * 32,), True),
        ((128, 32, 32, 3), False),  # images
        ((512, 3, 3, 512), False),  # the gradient of a kernel
        ((128, 10), False),
    ):
        for dtype in ("f32", "bf16"):
            outputs = (Shape(dtype, (3,)), Shape(dtype, dims))
            found = wide_activations([dataclasses.replace(kernel, outputs=outputs)])
            assert found == ({dims} if is_seen and dtype == "f32" else set())


@has_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", CEILINGS)
def test_a_program_for_an_h200_stays_below_its_ceilings(name):
    *_, most, gigabytes = CEILINGS[name]
    counts = aot.counts_of(*compiled_for_h200(name))
    found = sum(counts["kernels"].values()), sum(counts["bytes"].values()) / 1e9
    assert found[0] <= most, found
    assert found[1] <= gigabytes, found
    # A ceiling is tightened with every gain, so that none is lost unseen.
    assert found[0] > 0.95 * most, found
    assert found[1] > 0.95 * gigabytes, found


@has_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["st", "sam", "at", "trades"])
def test_activations_in_bfloat16_stay_so(name):
    assert wide_activations(compiled_for_h200(name)[0]) == set()


@has_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["st", "two seeds", "sam", "at", "trades"])
def test_the_loops_of_a_step_transpose_nothing(name):
    found, _ = compiled_for_h200(name)
    assert [k.name for k in found if k.loop and "transpose" in k.opcodes] == []


@has_compiler
@pytest.mark.slow
def test_eight_devices_wait_once_a_layer_and_pass_and_for_the_gradients():
    config = helpers.make_config("st", {"training.batch_size": 16})
    with helpers.usual_compilation():
        found = aot.counted("step", config, "h200", devices=8)
    assert found["kernels"]["collectives"] == 2 * 3 + 1  # three layers


# Compiled for a TPU.


@pytest.mark.skipif(
    not ON_CPU or not aot._is_installed("libtpu"),
    reason='wants JAX_PLATFORMS=cpu and pip install "samrobust[tpu]"',
)
@pytest.mark.slow
def test_a_step_compiles_for_a_tpu_and_its_loops_are_counted():
    small = {"model.dtype": "bfloat16", "training.steps_per_call": 25}
    config = helpers.make_config("at,norm=linf,eps=16", small)
    with helpers.usual_compilation():
        found = aot.counted("step", config, "v5e")
    assert [body["runs"] for body in found["bodies"]] == [1, 2]
    assert all(body["kernels"]["convolutions"] > 0 for body in found["bodies"])
