"""TensorBoard and Weights & Biases: what `metrics.jsonl` says, shown elsewhere too.

`metrics.jsonl` stays the truth. A tracker is sent its lines after they are written
there, from the first one on after every start, and drops what it had beyond: a run that
was killed has no step twice. A tracker that fails warns once, is closed and left out;
the run goes on.
"""

import contextlib
import importlib
import pathlib
import re
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import util
from typing import Any, TypeAlias

from samrobust.checks import check
from samrobust.system.files import glance, read_json_lines, write_json
from samrobust.system.storage import ObjectPath
from samrobust.types import Config

__all__ = ["Tracking", "check_trackers"]

_PACKAGES = {"tensorboard": ("tensorboardX", "2.6"), "wandb": ("wandb", "0.18")}
# Seconds for W&B to send what is left: at the end, and of a tracker that failed.
_PATIENCE, _SHORT_PATIENCE = 60.0, 5.0


def check_trackers(config: Config, workdir: pathlib.Path) -> None:
    """Refuses a tracker whose package is missing, or that cannot write to the workdir.

    Raises:
      ValueError: with the command that installs it, or why not.
    """
    check(
        not (config.tracking.tensorboard and isinstance(workdir, ObjectPath)),
        "a workdir on a disk with tracking.tensorboard",
        "metrics.jsonl has every epoch, and tracking.wandb works.",
        workdir=str(workdir),
    )
    for name, (package, version) in _PACKAGES.items():
        wanted = config.tracking[name]
        spec = util.find_spec(package) if wanted else None
        # A mere directory of that name, as W&B makes, is found without an origin.
        holds = not wanted or (spec is not None and bool(spec.origin))
        fix = f"Install it: pip install '{package}>={version}'."
        check(holds, f"the package {package}", fix, **{f"tracking.{name}": wanted})


class Tracking:
    """Trackers of a run, as its config says: `tracking.tensorboard` and `.wandb`.

    Opens nothing before the first epoch's line; to be closed.

    Args:
      config: of the run.
      workdir: of the run; claimed.
    """

    def __init__(self, config: Config, workdir: pathlib.Path):
        self._log = workdir / "metrics.jsonl"
        self._seen = -1
        self._finished = False
        self._unopened: list[Callable[[], _Tracker]] = []
        if config.tracking.tensorboard:
            self._unopened.append(lambda: _TensorBoard(workdir))
        if config.tracking.wandb:
            self._unopened.append(lambda: _WandB(config, workdir))
        self._open: list[_Tracker] = []

    def following(self, on_progress: Callable[[Any], None]) -> Callable[[Any], None]:
        """Returns an `on_progress` that also passes on the lines new by then."""
        if not self._unopened:
            return on_progress

        def follow(progress: Any) -> None:
            if progress.metrics and progress.metrics["step"] > self._seen:
                self._catch_up()
            on_progress(progress)

        return follow

    def finish(self, accuracy: dict[str, float]) -> None:
        """Passes on the final accuracies, in percent by the attacks' names."""
        self._finished = True
        self._catch_up()
        # `linf 8/255` as a name that both trackers leave as it is: `linf_8_255`.
        tags = {f"result/{re.sub('[ /]', '_', n)}": v for n, v in accuracy.items()}
        self._each(lambda tracker: tracker.conclude(tags, self._seen))

    def close(self) -> None:
        """Closes what was opened."""
        while self._open:
            with _warning_once():
                self._open.pop().close(self._finished, _PATIENCE)

    def _catch_up(self) -> None:
        while self._unopened:
            with _warning_once():
                self._open.append(self._unopened.pop(0)())
        for line in read_json_lines(self._log):
            if line.get("step", -1) > self._seen:
                self._seen = line.pop("step")
                scalars = {n: v for n, v in line.items() if isinstance(v, int | float)}
                self._each(lambda t, scalars=scalars: t.add(scalars, self._seen))

    def _each(self, act: "Callable[[_Tracker], None]") -> None:
        """Does it with all; one that fails is closed and left out from now on."""
        for tracker in list(self._open):
            with _warning_once():
                try:
                    act(tracker)
                except Exception:
                    self._open.remove(tracker)
                    with contextlib.suppress(Exception):  # why it failed is said
                        tracker.close(finished=False, patience=_SHORT_PATIENCE)
                    raise


class _TensorBoard:
    """Event files in `tensorboard/`, for `tensorboard --logdir=WORKDIR`.

    Written here and now: the package's own writer hands events to a thread, where a
    full disk would go unnoticed, then hang the run, then spoil the process's end.
    """

    def __init__(self, workdir: pathlib.Path):
        from tensorboardX.event_file_writer import EventsWriter

        proto: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        self._event = proto.Event
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        # All lines come again: whatever earlier processes wrote is purged.
        start = proto.SessionLog(status=proto.SessionLog.START)
        self._writer.write_event(proto.Event(step=0, session_log=start))

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        from tensorboardX.summary import scalar

        now = time.time()
        for name, value in scalars.items():
            summary = scalar(name, value)
            event = self._event(step=step, wall_time=now, summary=summary)
            self._writer.write_event(event)
        self._writer.flush()

    conclude = add

    def close(self, finished: bool, patience: float) -> None:
        del finished, patience
        self._writer.close()


class _WandB:
    """A W&B run; a restart goes on in it, by the id kept in `wandb.json`."""

    def __init__(self, config: Config, workdir: pathlib.Path):
        import wandb

        self._tear_down: Callable[[], None] = wandb.teardown
        path = workdir / "wandb.json"
        stored = glance(path).get("id") or uuid.uuid4().hex[:8]
        write_json(path, {"id": stored})
        self._run = wandb.init(
            project=config.tracking.wandb,
            id=stored,
            resume="allow",
            name=f"{config.label}, seed {config.seed}",
            group=config.data.name,
            config=config.to_dict(),
            # Its own default, where what it keeps meanwhile cannot be in the workdir.
            dir=None if isinstance(workdir, ObjectPath) else str(workdir),
            settings=wandb.Settings(console="off", silent=True),
        )

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        if step >= self._run.step:  # what it has cannot be changed
            self._run.log(scalars, step=step, commit=True)

    def conclude(self, scalars: Mapping[str, float], step: int) -> None:
        del step
        self._run.summary.update(scalars)

    def close(self, finished: bool, patience: float) -> None:
        """Waits for what is left to be sent, but not for ever."""
        errors: list[Exception] = []

        def finish() -> None:
            try:
                self._run.finish(exit_code=0 if finished else 1)
            except Exception as error:
                errors.append(error)
                with contextlib.suppress(Exception):
                    self._tear_down()  # or it tries again at the process's end

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(patience)
        if thread.is_alive():
            message = f"not sent within {patience:g} s; `wandb sync` sends it later"
            raise TimeoutError(message)
        if errors:
            raise errors[0]


_Tracker: TypeAlias = _TensorBoard | _WandB


@contextlib.contextmanager
def _warning_once() -> Iterator[None]:
    """Turns an error of a tracker into a warning."""
    try:
        yield
    except Exception as error:
        message = (
            f"A tracker failed and is left out ({type(error).__name__}: {error}). "
            "The run continues; metrics.jsonl has every epoch."
        )
        warnings.warn(message, stacklevel=2)
