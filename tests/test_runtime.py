"""Settings of the process: caches, signals, and where a number comes from."""

import json
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import time

import helpers
import jax
import jax.numpy as jnp
import pytest

from samrobust.models.conv import conv2d
from samrobust.system import compiler
from samrobust.system.compiler import (
    add_compiler_options,
    compiler_options,
    deterministic_programs,
)
from samrobust.system.provenance import commit, provenance
from samrobust.system.runtime import (
    EXIT_CODES,
    StopRequest,
    cache_folder,
    enable_compilation_cache,
    trusted_cache_folder,
)


def compilation_cache(**environment):
    script = (
        "import jax\nfrom samrobust.system.runtime import enable_compilation_cache\n"
        "enable_compilation_cache()\nprint(jax.config.jax_compilation_cache_dir)"
    )
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name != "JAX_COMPILATION_CACHE_DIR"
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_compiled_programs_are_kept_in_the_users_cache_folder(tmp_path):
    folder = compilation_cache(XDG_CACHE_HOME=str(tmp_path))
    assert folder == str(tmp_path / "samrobust" / "xla")


def test_the_compilation_cache_can_be_switched_off():
    assert compilation_cache(SAMROBUST_COMPILATION_CACHE="off") == "None"


def test_the_users_own_compilation_cache_wins(tmp_path):
    chosen = str(tmp_path / "mine")
    assert compilation_cache(JAX_COMPILATION_CACHE_DIR=chosen) == chosen


def test_the_cache_folder_is_in_the_home_by_default(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == pathlib.Path("/home/somebody/.cache/samrobust")


def test_without_a_home_there_is_no_cache_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # is none, by the specification
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.warns(UserWarning, match="there is no home directory.*XDG_CACHE_HOME"):
        assert trusted_cache_folder("without a home") is None
    assert list(tmp_path.iterdir()) == []


def test_a_cache_folder_is_made_for_its_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert trusted_cache_folder("xla") == cache_folder() / "xla"
    assert trusted_cache_folder() == cache_folder()
    for folder in (cache_folder(), cache_folder() / "xla"):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_cache_folder_that_others_can_write_to_is_refused_once(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: pytest.fail("it is used"))
    for name, spoil in {
        "group": lambda folder: folder.chmod(0o720),
        "others": lambda folder: folder.chmod(0o702),
        "inner": lambda folder: (folder / "xla").chmod(0o777),
        "owner": lambda _: monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1),
        "read-only": lambda _: monkeypatch.setattr(os, "access", lambda *_: False),
        "file": lambda folder: folder.rename(folder.with_suffix(".x")),
    }.items():
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        (cache_folder() / "xla").mkdir(parents=True)
        spoil(cache_folder())
        if name == "file":
            cache_folder().write_text("")
        with pytest.warns(UserWarning, match=f"The cache .*{name}.* is not used: it"):
            enable_compilation_cache()
        assert trusted_cache_folder("xla") is None  # and no second warning
        if name == "read-only":
            monkeypatch.setattr(os, "access", lambda *_: True)


def test_a_switch_that_is_neither_on_nor_off_names_its_variable(monkeypatch):
    monkeypatch.setenv("SAMROBUST_COMPILATION_CACHE", "maybe")
    with pytest.raises(ValueError, match="got SAMROBUST_COMPILATION_CACHE='maybe'"):
        enable_compilation_cache()


def in_a_fresh_process(script, **environment):
    """What a script prints, with no XLA or malloc settings but those given."""
    foreign = ("XLA_FLAGS", "MALLOC_", "GLIBC_TUNABLES")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


OPTIONS = (
    "from samrobust.system.compiler import compiler_options; import os\n"
    "print(bool(compiler_options()), os.environ.get('XLA_FLAGS'))"
)
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="options of the CPU")


@on_cpu
def test_the_compiler_options_take_convolutions_away_from_ynnpack():
    images, kernel = jnp.ones((8, 16, 16, 16)), jnp.ones((3, 3, 16, 16))

    def convolve(images, kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    program = jax.jit(convolve, compiler_options=compiler_options())
    with helpers.usual_compilation():
        text = program.lower(images, kernel).compile().as_text()
    assert "ynn_fusion" not in (text or "")


@on_cpu
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="jaxlib without oneDNN")
@pytest.mark.filterwarnings("ignore:Error writing persistent compilation cache entry")
def test_onednn_takes_all_convolutions_but_those_of_kernels_gradients():
    def loss(images, kernels):
        for kernel in kernels:
            images = jax.nn.relu(conv2d(images, kernel, 1, 1))
        return jnp.sum(images**2)

    gradients = jax.jit(jax.grad(loss, (0, 1)), compiler_options=compiler_options())
    with helpers.usual_compilation():
        lowered = gradients.lower(
            jnp.ones((8, 16, 16, 16)), jnp.ones((2, 3, 3, 16, 16))
        )
        text = lowered.compile().as_text() or ""
    assert text.count('custom_call_target="__onednn$convolution"') == 2 + 2
    assert text.count(" convolution(") == 2


@on_cpu
def test_what_the_user_chose_or_xla_does_not_know_is_left_out(monkeypatch):
    usual = compiler_options()
    assert "xla_cpu_experimental_onednn_custom_call" in usual
    for name in usual:
        with monkeypatch.context() as patch:
            patch.setenv("XLA_FLAGS", f"--{name}=false")
            assert compiler_options().keys() == usual.keys() - {name}
    unknown = compiler._CPU_OPTIONS | {"xla_cpu_of_another_time": True}
    monkeypatch.setattr(compiler, "_CPU_OPTIONS", unknown)
    assert compiler_options() == usual


@on_cpu
def test_the_compiler_options_leave_the_environment_as_it_is():
    assert in_a_fresh_process(OPTIONS) == "True None"


@on_cpu
def test_the_users_own_choice_among_xlas_flags_wins():
    flags = "--xla_cpu_experimental_ynn_fusion_type=individual_dot"
    flags += " --xla_backend_optimization_level=2"
    flags += " --xla_cpu_experimental_onednn_custom_call=false"
    assert in_a_fresh_process(OPTIONS, XLA_FLAGS=flags) == f"False {flags}"


@on_cpu
@pytest.mark.parametrize("is_off", [False, True])
def test_llvms_first_level_is_enough_unless_jax_is_asked_for_less(is_off, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with helpers.usual_compilation():  # which is put back
        jax.config.update("jax_disable_most_optimizations", is_off)
        level = compiler_options().get("xla_backend_optimization_level")
    assert level == (None if is_off else "1")


def test_a_gpu_alone_needs_another_program_to_give_the_same_bits_again(monkeypatch):
    usual = compiler_options()
    if jax.default_backend() == "cpu":
        with deterministic_programs(True):
            assert compiler_options() == usual
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler_options() == {}
    with deterministic_programs(True), deterministic_programs(False):
        options = compiler_options()
    assert compiler_options() == {}
    assert options == {"xla_gpu_deterministic_ops": True}
    jax.jit(lambda: 0, compiler_options=options).lower().compile()  # XLA knows it


def test_options_that_are_added_hold_for_every_program(monkeypatch):
    monkeypatch.setattr(compiler, "_added_options", {})
    add_compiler_options("--xla_gpu_autotune_level=0 --xla_gpu_deterministic_ops=false")
    added = {"xla_gpu_autotune_level": "0", "xla_gpu_deterministic_ops": False}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with deterministic_programs(True):
        assert compiler_options() == added
    for flags in ("xla_a=1", "--xla_a", "--other=1"):
        with pytest.raises(ValueError, match=f"--xla_NAME=VALUE, .* flag='{flags}'"):
            add_compiler_options(flags)


def test_what_fails_without_options_is_no_fault_of_theirs():
    def out_of_memory(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory")

    with pytest.raises(jax.errors.JaxRuntimeError, match="no memory"):
        compiler.check_compiler_options("--xla_a=1", out_of_memory)


COMPILE = """
import jax, jax.numpy as jnp
from samrobust.system.runtime import enable_compilation_cache
enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print("autotune" in jax.config.jax_persistent_cache_enable_xla_caches)
jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((4, 4)))
"""


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="programs are found by their folder's path"
)
def test_a_cache_that_was_carried_to_another_place_is_used_there(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    here, there = tmp_path / "here", tmp_path / "there"
    assert in_a_fresh_process(COMPILE, XDG_CACHE_HOME=str(here)) == "True"
    shutil.copytree(here, there)
    carried = {path.name for path in there.rglob("*-cache")}
    assert in_a_fresh_process(COMPILE, XDG_CACHE_HOME=str(there)) == "True"
    assert carried
    assert {path.name for path in there.rglob("*-cache")} == carried


KEEP = """
from samrobust.system.runtime import keep_freed_memory
import numpy as np, resource
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def pages():
    return int(open("/proc/self/statm").read().split()[0])
kept = keep_freed_memory()
for _ in range(2):
    faults_before = faults()
    block = np.ones(2**23)  # 64 MiB, written to and freed
    faults_of_the_block, pages_before = faults() - faults_before, pages()
    del block
print(kept, pages() == pages_before, faults_of_the_block)
"""
on_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's"
)


@on_glibc
def test_freed_memory_is_used_again_without_page_faults():
    kept, stays, faults = in_a_fresh_process(KEEP).split()
    assert (kept, stays) == ("True", "True")
    assert int(faults) < 100


@on_glibc
def test_the_users_own_settings_of_malloc_win():
    # Not the faults: on huge pages they are few, whoever has the memory meanwhile.
    kept, stays, _ = in_a_fresh_process(KEEP, MALLOC_ARENA_MAX="2").split()
    assert (kept, stays) == ("False", "False")


COLLECT = """
import atexit, gc
def report(): print(gc.get_freeze_count() > 1000)
atexit.register(report)
from samrobust.system.runtime import collect_garbage_seldom
collect_garbage_seldom()
before = gc.get_stats()[0]["collections"]
kept = [[] for _ in range(50_000)]
print(gc.get_stats()[0]["collections"] - before)
"""


def test_what_stays_is_not_looked_through_again_and_again_nor_at_the_end():
    assert in_a_fresh_process(COLLECT).split() == ["0", "True"]


@pytest.fixture
def terminal():
    """SIGHUP as in a terminal, even where `nohup` runs the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("number", EXIT_CODES)
def test_a_signal_becomes_a_question_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with StopRequest().listening() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop()
        assert stop.signal == number
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("terminal")
def test_a_closed_terminal_that_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest().listening() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# A command in a terminal; what it shows after the end of that must harm nothing.
IN_A_TERMINAL = """
import pathlib, sys, time
from samrobust.system.runtime import StopRequest
with StopRequest().listening() as stop:
    print("now", flush=True)
    while not stop():
        time.sleep(0.01)
    print("stopping", flush=True)
    print("stopping", file=sys.stderr, flush=True)
    pathlib.Path(sys.argv[1]).write_text("saved")
"""


# One that nobody tells of the end of its terminal, as after `disown`.
DISOWNED = """
import os, pathlib, signal, sys, time
from samrobust.experiments.reporting.console import make_console
signal.signal(signal.SIGHUP, signal.SIG_IGN)
console = make_console()
console.print("now")
while os.isatty(1):
    time.sleep(0.01)
console.print("going on")
console.print("going on")
pathlib.Path(sys.argv[1]).write_text("saved")
"""


def test_a_console_without_a_terminal_shows_nothing_and_work_goes_on(tmp_path):
    assert in_a_closed_terminal(DISOWNED, tmp_path / "state") == (0, "saved")


def test_a_closed_terminal_leaves_time_to_save(tmp_path):
    assert in_a_closed_terminal(IN_A_TERMINAL, tmp_path / "state") == (0, "saved")


def in_a_closed_terminal(script: str, state: pathlib.Path) -> tuple[int, str]:
    """Runs a script until it says `now`; its exit code, and what it saved later."""
    process, ours = helpers.start_in_a_terminal("-c", script, str(state))
    said = b""
    while b"\n" not in said:  # a line that is cut would fail to be written
        said += os.read(ours, 100)
    assert said.startswith(b"now")
    os.close(ours)
    return process.wait(60), state.read_text() if state.exists() else ""


def test_the_second_ctrl_c_interrupts_at_once():
    with StopRequest().listening():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# One call that no signal interrupts, like a compilation or a batch on the device.
BUSY = """
import hashlib, sys
from samrobust.system.runtime import StopRequest
patience, alone = eval(sys.argv[1])
with StopRequest(patience, is_alone=lambda: alone).listening():
    print("now", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[2]))
print("done")
"""


def is_pending(pid: int, number: signal.Signals) -> int:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    (mask,) = re.findall(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)
    return int(mask, 16) >> (number - 1) & 1


@pytest.mark.parametrize(
    ("options", "signals", "iterations", "code", "error"),
    [
        ((0.2, True), [signal.SIGTERM], 10**9, 75, "samrobust: Stopped at once"),
        ((0.2, True), [signal.SIGINT], 10**9, 130, "samrobust: Stopped at once"),
        ((None, True), [signal.SIGINT] * 2, 10**9, 130, "samrobust: Stopped at once"),
        ((None, True), [signal.SIGTERM] * 2, 10**6, 0, ""),
        ((0.2, False), [signal.SIGTERM], 10**6, 0, ""),
    ],
)
def test_a_signal_is_answered_in_the_midst_of_a_computation_that_may_be_lost(
    options, signals, iterations, code, error
):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, repr(options), str(iterations)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    for number in signals:
        process.send_signal(number)
        while is_pending(process.pid, number):  # two at once would be one
            time.sleep(0.01)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code
    assert errors[: len(error)] == error
    assert errors.count("\n") == (code != 0)
    assert output == ("done\n" if code == 0 else "")


def test_provenance_names_commit_versions_device_and_command(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_flag_of_ours=1")
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    found = provenance()
    assert found["flags"]["XLA_FLAGS"] == "--xla_flag_of_ours=1"
    assert "LIBTPU_INIT_ARGS" not in found["flags"]
    assert json.loads(json.dumps(found)) == found
    assert found["jax"] == jax.__version__
    assert found["num_devices"] == jax.device_count()
    assert found["command"]
    assert found["commit"] is None or len(found["commit"].split("+")[0]) == 40


def test_an_installed_wheel_names_the_tag_of_its_release(tmp_path, monkeypatch):
    file = f"{tmp_path}/samrobust/system/provenance.py"
    monkeypatch.setattr("samrobust.system.provenance.__file__", file)
    assert commit.__wrapped__() == f"v{provenance()['samrobust']}"


def test_the_commit_is_that_of_the_code_that_was_started(monkeypatch):
    begun = provenance()["commit"]
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("asked again"))
    assert provenance()["commit"] == begun
