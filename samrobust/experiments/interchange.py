"""The network of a run as weights for other tools, and a run made of such weights.

Files are read and written by `samrobust.models.torch`; docs/interchange.md describes
them.
"""

import hashlib
import json
import pathlib
from typing import Any

from samrobust.checks import check
from samrobust.experiments import building
from samrobust.experiments.components import model_fields, takes
from samrobust.experiments.configuration import as_dict
from samrobust.experiments.networks import load_network, save_variables
from samrobust.experiments.workdir import OtherConfigError, config_changes
from samrobust.models import PreActResNet
from samrobust.models.torch.names import from_tensors, infer_architecture, to_tensors
from samrobust.models.torch.weights import Weights
from samrobust.system.claims.lease import claim
from samrobust.system.files import WorkdirError, glance, write_json
from samrobust.system.provenance import provenance
from samrobust.system.storage import remove_tree
from samrobust.training.checkpoint import CheckpointError, Checkpoints
from samrobust.training.log import checkpoint_folder
from samrobust.types import Config

__all__ = ["describe", "export_weights", "import_weights"]

# Files that training leaves in a workdir, or a table in its own, and those of a
# network's evaluations.
_OF_TRAINING = ("metrics.jsonl", "result.json", "checkpoints/best", "plan.json")
_OF_EVALUATIONS = ("evaluations.jsonl", "autoattack")


def export_weights(
    config: Config, workdir: pathlib.Path, which: str, step: int | None = None
) -> Weights:
    """Returns the tensors of a run's network, and what other tools must know of it.

    Args:
      config: of the run.
      workdir: of the run.
      which: `last` or `best`.
      step: of the checkpoint; None for the newest.

    Raises:
      CheckpointError: if the run has no intact checkpoint of that kind, or was trained
        on other data than those of today.
    """
    data = building.load_facts_or_data(config)
    network = load_network(config, data, workdir, which, step=step)
    imported = glance(workdir / "import.json")
    origin = {
        "label": config.label,
        "row": config.row,
        "seed": config.seed,
        "checkpoint": which,
        "step": network.step,
        "identity": network.identity.hash,
        "network": network.checksum(),
        "imported": {n: imported[n] for n in ("source", "sha256") if n in imported},
    }
    section = config.model
    own = {name: section[name] for name in model_fields(section.name)}
    if not isinstance(network.model, PreActResNet):
        own = {"model": {"name": section.name, **own}}
    moments = {name: section[name] or getattr(data, name) for name in ("mean", "std")}
    normalizes = any(takes(section.name, name) for name in moments)
    metadata = {
        **({n: list(values) for n, values in moments.items()} if normalizes else {}),
        "num_classes": data.num_classes,
        **json.loads(json.dumps(own)),
        "origin": origin,
    }
    return Weights(to_tensors(network.variables, network.model), metadata)


def describe(config: Config, weights: Weights) -> None:
    """Writes into a config what a file of weights says of its network.

    Raises:
      ValueError: if its metadata contradict its tensors, or are of another network than
        the config's.
    """
    if "model" in weights.metadata:
        _describe_another(config.model, weights.metadata["model"])
    elif config.model.name == "preact_resnet":
        architecture = infer_architecture(weights.tensors)
        for name, value in architecture.items():
            told = list(value) if name == "blocks" else value
            claimed = weights.metadata.get(name, told)
            wanted = f"{name}={told} as in the tensors"
            check(claimed == told, wanted, **{name: claimed})
        config.model.update({name: architecture[name] for name in ("width", "blocks")})
    for name in ("mean", "std"):
        is_open = takes(config.model.name, name) and config.model[name] is None
        if is_open and name in weights.metadata:
            config.model[name] = tuple(weights.metadata[name])
    config.label = f"Imported {config.label}"


def _describe_another(section: Config, told: Any) -> None:
    """Writes the fields of another network than `PreActResNet` into `config.model`.

    No shape of a tensor tells all of them: not the heads of a transformer.
    """
    said = told if isinstance(told, dict) else {"name": told}
    wanted = f"model.name={said.get('name')} as in the file"
    check(said.get("name") == section.name, wanted, **{"model.name": section.name})
    for name, field in model_fields(section.name).items():
        if name in said:
            value = said[name]
            value = tuple(value) if isinstance(value, list) else value
            field.rule(**{f"model.{name}": value})
            section[name] = value


def import_weights(
    config: Config, weights: Weights, source: pathlib.Path, workdir: pathlib.Path
) -> bool:
    """Makes a workdir like that of a run before its first step.

    After a kill at any moment the same call begins again.

    Args:
      config: validated, with the fields of `describe`.
      weights: the content of the file.
      source: the file.
      workdir: may not hold another run.

    Returns:
      Whether all this was done before.

    Raises:
      ValueError: if the tensors do not fit the network; names them.
      WorkdirError: if the workdir holds another run, or cannot be written.
      CheckpointError: if the checkpoint cannot be written.
    """
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    facts = building.load_facts(config)
    model = building.make_model(config, facts)
    variables = from_tensors(weights.tensors, model, facts.image_shape)
    note = {
        "source": source.name,
        "sha256": digest,
        "metadata": weights.metadata,
        "notes": list(weights.notes),
        "provenance": provenance(),
    }
    _is_done(workdir, digest, config)  # refuses another run before it is claimed
    with claim(workdir):
        done = _is_done(workdir, digest, config)
        if not done:
            # After a kill the same command, or the import of another file, takes what
            # is there for its own: the config, written last, ends it.
            remove_tree(workdir / "checkpoints")
            write_json(workdir / "import.json", note)
            save_variables(config, facts, workdir, variables, digest)
        given = as_dict(config)
        if glance(workdir / "config.json") != given:
            write_json(workdir / "config.json", given)
    return done


def _is_done(workdir: pathlib.Path, digest: str, config: Config) -> bool:
    """Tells whether the workdir is what this import makes of it.

    Raises:
      WorkdirError: if it holds another run, or what one has left.
    """
    with Checkpoints(checkpoint_folder(workdir, "last")) as checkpoints:
        step = checkpoints.latest_step()
    imported = glance(workdir / "import.json").get("sha256")
    is_whole = (workdir / "config.json").exists()
    strange = list(_OF_TRAINING)
    if not is_whole:
        strange += [*_OF_EVALUATIONS, *(() if imported else ("checkpoints",))]
    elif imported != digest:
        strange += ["config.json", "import.json", "checkpoints"]
    others = [name for name in strange if (workdir / name).exists()]
    if step:
        others.append(f"a checkpoint of step {step}")
    if others:
        raise WorkdirError(
            f"Expected a --workdir without a run, got workdir={str(workdir)!r} with "
            f"{', '.join(others)}. Choose another."
        )
    if changed := config_changes(workdir, config):
        raise OtherConfigError.over(workdir, "this file's import", changed)
    if not is_whole:
        return False
    try:  # whether the network is there that `import.json` names
        load_network(config, building.load_facts(config), workdir, "last")
    except CheckpointError:
        return False
    return True
