"""`samrobust evaluate`: a trained run under other attacks."""

import argparse
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from samrobust.checks import NORMS, check
from samrobust.cli import flags

if TYPE_CHECKING:
    from rich.console import Console

    from samrobust.types import Config

__all__ = ["ABOUT", "add_flags", "run"]

_OF_PGD = ("num_steps", "restarts", "loss", "judge", "early_stop", "step_size")
_OF_AUTOATTACK = ("version", "members", "save_examples")
_SANITY_EXAMPLES = 256


ABOUT = {
    "help": "attack a trained run again, under other attacks",
    "description": "Attacks the network of a finished or stopped run. Prints the "
    "accuracies and adds them to evaluations.jsonl in its workdir.",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    own = "default: the run's"
    add("--workdir", **flags.WORKDIR, required=True, help="of the run")
    add("--attack", choices=("pgd", "autoattack"), help=own)
    add("--version", **flags.VERSION)
    add("--members", **flags.MEMBERS)
    examples = "keep AutoAttack's adversarial images, beside its results"
    add("--save-examples", **flags.SWITCH, help=examples)
    add("--num-examples", **flags.COUNT, help=f"test images, evenly spread; {own}")
    add("--norm", choices=NORMS, action="append", help="default: both")
    radii = "radius in 1/255, needs --norm; repeatable"
    add("--epsilon", **flags.POSITIVE, action="append", help=f"{radii}; {own}")
    add("--step-size", **flags.POSITIVE, help=f"in 1/255; {own}")
    add("--num-steps", **flags.COUNT, help=own)
    add("--restarts", **flags.COUNT, help=own)
    add("--loss", **flags.LOSS, help=own)
    add("--judge", choices=("final", "any"), help=f"which iterate is judged; {own}")
    skip = "skip broken images in later steps; with --judge=any the same outcome"
    add("--early-stop", **flags.SWITCH, help=skip)
    add("--checkpoint", **flags.CHECKPOINT)
    add("--step", **flags.STEP)
    add("--batch-size", **flags.COUNT, help=own)
    add("--dtype", **flags.PRECISION, help=f"of the network; {own}")
    add("--seed", **flags.SEED, help=f"of the random starts; {own}")
    sanity = "also look for signs of gradient masking; see docs/sanity.md"
    add("--sanity", action="store_true", help=sanity)
    images = f"with --sanity: images, evenly spread; default: {_SANITY_EXAMPLES}"
    add("--sanity-examples", **flags.COUNT, help=images)
    others = "with --sanity: another run whose adversarial images are tried; repeatable"
    add("--transfer-from", **flags.WORKDIR, action="append", help=others)


def run(arguments: argparse.Namespace, stop: Callable[[], bool]) -> int:
    """Attacks a run's network again, prints and keeps the accuracies.

    Raises:
      ValueError: for flags that do not go together, or values out of range.
      CheckpointError: if the run has no intact checkpoint of that kind, or a run to
        transfer from has none.
      InterruptedRunError: if it was asked to stop.
    """
    from samrobust.cli.sanity import check_network, load_surrogates
    from samrobust.cli.shared import await_holder, join, show_accuracies
    from samrobust.experiments import building
    from samrobust.experiments.networks import load_network
    from samrobust.experiments.reporting.names import attack_in_words
    from samrobust.experiments.reporting.progress import ProgressDisplay
    from samrobust.experiments.scoring import Scorer, evaluated_split, evaluation_work
    from samrobust.experiments.workdir import add_evaluation
    from samrobust.system.distributed import broadcast_from_primary

    workdir = arguments.workdir
    should_stop, console = join(stop)
    config, others = broadcast_from_primary(lambda: _inputs(workdir, arguments))
    dataset, which = building.load_data(config), config.evaluation.checkpoint
    network = load_network(config, dataset, workdir, which, step=arguments.step)
    surrogates = load_surrogates(config, dataset, others)
    work = evaluation_work(config, dataset)
    keeps_examples = bool(arguments.save_examples)
    if keeps_examples:
        await_holder(workdir / "autoattack", console, should_stop)
    display = ProgressDisplay(console, work)
    with display.live():
        on_batch = display.run(config.label, 0.0, work).on_batch
        scored = Scorer(config, dataset)(
            *(network, workdir, on_batch, should_stop),
            keep_examples=keeps_examples,
        )
    show_accuracies(console, config.label, scored.accuracy)
    if of_autoattack := scored.details.get("autoattack"):
        _show_members(console, of_autoattack, workdir, keeps_examples)
    num_test = len(evaluated_split(config, dataset))
    evaluation = config.evaluation.to_dict()
    console.print(
        f"On {num_test} {evaluation['split']} images: {attack_in_words(evaluation)}; "
        f"{which} checkpoint, step {network.step}, run {network.identity.hash}"
    )
    line = {
        **scored.as_dict(),
        "evaluation": evaluation,
        "dtype": config.model.dtype,
        "num_test": num_test,
        "seed": config.seed,
    }
    path = broadcast_from_primary(lambda: add_evaluation(workdir, line))
    console.print(f"Added to {path}")
    if arguments.sanity:
        check_network(
            *(network, dataset, workdir, console),
            surrogates=surrogates,
            num_examples=arguments.sanity_examples or _SANITY_EXAMPLES,
            should_stop=should_stop,
        )
    return 0


def _show_members(
    console: "Console",
    of_autoattack: Mapping[str, Any],
    workdir: pathlib.Path,
    keeps_examples: bool,
) -> None:
    """Shows what each member of AutoAttack left, and where the rest is."""
    for column, left in of_autoattack["after_each"].items():
        cells = ", ".join(f"{member} {value:.2f}" for member, value in left.items())
        console.print(f"{column} after {cells}")
        outcome = workdir / of_autoattack["outcome"][column]
        console.print(f"What broke which image: {outcome}")
        if keeps_examples:
            examples = outcome.with_name(f"{outcome.stem}-examples.npy")
            console.print(f"Adversarial images: {examples}")


def _inputs(
    workdir: pathlib.Path, arguments: argparse.Namespace
) -> "tuple[Config, dict[pathlib.Path, Config]]":
    """Returns the run's config, and those of the runs to transfer from."""
    from samrobust.cli.sanity import check_surrogates, largest_balls
    from samrobust.experiments.workdir import EVALUATIONS
    from samrobust.system.files import check_writable
    from samrobust.system.storage import ObjectPath

    number, others = arguments.sanity_examples, arguments.transfer_from or []
    check(
        arguments.sanity or not (others or number is not None),
        "--sanity with --transfer-from and --sanity-examples",
        transfer_from=list(map(str, others)),
        sanity_examples=number,
    )
    check(
        not (arguments.save_examples and isinstance(workdir, ObjectPath)),
        "a workdir on a disk with --save-examples",
        "Copy the run to one: what was evaluated there goes on here.",
        workdir=str(workdir),
    )
    config = _config(workdir, arguments)
    check(
        not arguments.sanity or bool(largest_balls(config)),
        "a radius > 0 with --sanity",
        "Give --norm and --epsilon.",
        linf=config.evaluation.linf,
        l2=config.evaluation.l2,
    )
    check_writable(workdir, EVALUATIONS)
    return config, check_surrogates(config, others)


def _config(workdir: pathlib.Path, arguments: argparse.Namespace) -> "Config":
    """Returns the run's config with the flags written into it."""
    from samrobust.cli.shared import apply_flags
    from samrobust.experiments.networks import checkpoints_of
    from samrobust.experiments.validation import validate
    from samrobust.experiments.workdir import config_of_run

    run_config = config_of_run(workdir)
    norms, epsilons = arguments.norm or NORMS, arguments.epsilon
    attack = arguments.attack or run_config.evaluation.attack
    useless = _OF_PGD if attack == "autoattack" else _OF_AUTOATTACK
    given = list(flags.given(vars(arguments), useless))
    words = ", ".join("--" + name.replace("_", "-") for name in useless)
    check(
        not given,
        f"no {words} with that attack",
        "AutoAttack chooses its steps itself." if attack == "autoattack" else "",
        attack=attack,
        flags=given,
    )
    check(
        epsilons is None or len(norms) == 1,
        "one --norm with --epsilon",
        "For several norms call the command once for each.",
        norm=arguments.norm,
        epsilon=epsilons,
    )
    radii = {norm: epsilons if norm in norms else () for norm in NORMS}
    config = apply_flags(run_config, vars(arguments) | radii)
    if (step_size := arguments.step_size) is not None:
        attacked = [(norm, r) for norm in norms for r in config.evaluation[norm]]
        check(
            len(attacked) == 1,
            "one --norm and one --epsilon with --step-size",
            step_size=step_size,
            radii=[radius for _, radius in attacked],
        )
        ((norm, radius),) = attacked
        config.evaluation[f"{norm}_step"] = step_size / radius
    config.evaluation.checkpoint = checkpoints_of(config)[0]
    validate(config)
    return config
