"""Identity of a run: what makes a run this run and no other.

Every checkpoint and result holds the identity of its run and is compared with the run
that reads it; every number that leaves names its `hash`, beside the step of the network
that it was measured on.

Compared are the config's fields that shape a result, the data, the format of what a run
leaves, and JAX's way to draw random numbers. The versions of libraries are part of the
hash, but not compared: other versions round differently and are no other experiment.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from samrobust.checks import check
from samrobust.data import DATASETS, Dataset, DatasetFacts, fingerprint
from samrobust.experiments.configuration import as_dict, shaping_fields, with_defaults
from samrobust.experiments.methods import own_code
from samrobust.system.distributed import broadcast_from_primary, is_joined
from samrobust.system.fields import differences
from samrobust.system.provenance import commit, random_bits
from samrobust.system.resolve import sources
from samrobust.types import Config

__all__ = ["Identity", "changed_fields", "check_alike", "identity_of"]

# To be raised when a config and a seed come to mean other numbers, beyond rounding.
FORMAT = 1

_PACKAGES = ("samrobust", "jax", "jaxlib", "flax", "optax")
_IMPORTED = "import "  # begins the `data` of a network from a file
_NORMALIZED = " mean "  # begins what follows the fingerprint of data of one's own
# What the processes of a run may have each to itself.
_OWN_FIELDS = ("config.data.data_dir", "config.data.manual_dir")
_LENGTH = 16  # of a hash, in hexadecimal digits


@dataclasses.dataclass(frozen=True)
class Identity:
    """The identity of a run.

    Attributes:
      config: of the run, as JSON holds it; with `own_code` also `source`, the SHA-256
        of its files.
      data: fingerprint of the training and held-out examples; of an imported network
        the digest of its file; None where nothing is known. With the mean and the
        deviation by which the network normalizes, where the name of the data does not
        say them.
      format: `FORMAT` when the run began.
      random: what JAX drew from key 0: another generator, chosen by a setting or by
        another version, makes another run.
      versions: of the libraries that the run was begun with, and of those that it was
        then continued with, in order; with the commit of this package, which `hash`
        leaves out.
    """

    config: Mapping[str, Any]
    data: str | None
    format: int
    random: str
    versions: tuple[Mapping[str, str | None], ...]

    @property
    def hash(self) -> str:
        """Names the run, in 16 hexadecimal digits."""
        packages = {n: v for n, v in self.versions[0].items() if n != "commit"}
        begun = dataclasses.replace(self, versions=(packages,))
        text = json.dumps(dataclasses.asdict(begun), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]

    def as_dict(self) -> dict[str, Any]:
        """Returns it in JSON's types, for `from_dict`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, stored: object) -> "Identity | None":
        """Returns what `as_dict` gave; None for anything else."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(stored, dict) or stored.keys() != names:
            return None
        return cls(**{**stored, "versions": tuple(stored["versions"])})

    def refuse(self, stored: object, *, draws: bool = True) -> str:
        """Says why what a checkpoint holds of its run is not this run; empty if not.

        Args:
          stored: what `as_dict` gave.
          draws: as for `unlike`.
        """
        other = Identity.from_dict(stored)
        if other is None:
            return "it does not say of which, as those of older versions of samrobust"
        return other.unlike(self, draws=draws)

    def resumed(self, stored: object) -> "Identity":
        """Returns the identity of a run that goes on from a checkpoint of it.

        That of the run as it was begun, with the libraries of this process too.

        Args:
          stored: what `as_dict` gave, and `refuse` did not refuse.
        """
        begun = Identity.from_dict(stored)
        if begun is None:
            return self
        new = () if self.versions[0] == begun.versions[-1] else self.versions
        data, versions = begun.data or self.data, (*begun.versions, *new)
        return dataclasses.replace(begun, data=data, versions=versions)

    def branched(self, stored: object) -> "Identity":
        """Returns the identity of this run where it goes on from another's part.

        Its libraries are first those that trained that part.

        Args:
          stored: what `as_dict` gave of the run that is the part alone.
        """
        return dataclasses.replace(self, versions=self.resumed(stored).versions)

    def unlike(self, other: "Identity", *, draws: bool = True) -> str:
        """Says in what another run differs: `seed is 1, not 0`; empty if it does not.

        Args:
          other: the run that reads what this one left.
          draws: whether it draws further random numbers of the run.
        """
        changed = changed_fields(self.config, other.config)
        then, now = self.data or "", other.data or ""
        was, is_now = (data.startswith(_IMPORTED) for data in (then, now))
        if then and now and not (was and not is_now):
            if not (_NORMALIZED in then and _NORMALIZED in now):  # of older versions
                then, now = (data.partition(_NORMALIZED)[0] for data in (then, now))
            changed |= differences({"data": then}, {"data": now})
        changed |= differences({"format": self.format}, {"format": other.format})
        told = [
            f"{name.removeprefix('source.')}.py has changed"
            if name.startswith("source.")
            else f"{name} is {then!r}, not {now!r}"
            for name, (then, now) in changed.items()
        ]
        if draws and self.random != other.random:
            told.append(
                f"JAX drew {self.random!r} from a key and not {other.random!r}, which "
                "JAX_DEFAULT_PRNG_IMPL, JAX_THREEFRY_PARTITIONABLE or its version says"
            )
        return "; ".join(told)


def identity_of(
    config: Config, dataset: Dataset | DatasetFacts | None, digest: str | None = None
) -> Identity:
    """Returns the identity of a run that this process would begin.

    Args:
      config: of the run.
      dataset: that of `config.data`; None where the network was not trained on it, or
        facts or one without test images where no image is at hand.
      digest: SHA-256 of the file that the network was imported from, if it was.
    """
    source = sources(own_code(config))
    data = None if digest is None else f"{_IMPORTED}{digest}"
    if data is None and isinstance(dataset, Dataset) and len(dataset.test):
        data = f"{fingerprint(dataset.train)}+{fingerprint(dataset.validation)}"
    if data is not None and dataset is not None and config.data.name not in DATASETS:
        mean, std = config.model.mean or dataset.mean, config.model.std or dataset.std
        numbers = (" ".join(f"{x:.9g}" for x in each) for each in (mean, std))
        data += _NORMALIZED + " std ".join(numbers)
    return Identity(
        config=as_dict(config) | ({"source": source} if source else {}),
        data=data,
        format=FORMAT,
        random=random_bits(),
        versions=(_versions(),),
    )


def check_alike(config: Config, dataset: Dataset | DatasetFacts) -> None:
    """Refuses, in any other process, what is not as in process 0; all must call it.

    Args:
      config: of the run.
      dataset: that of `config.data`, or facts, without images to compare.

    Raises:
      ValueError: if the config, own code, data or JAX's random numbers differ.
    """
    if not is_joined():
        return
    own = identity_of(config, dataset)
    ours = {"config": own.config, "data": own.data, "random": own.random}
    if isinstance(dataset, Dataset):
        ours["test"] = fingerprint(dataset.test)
    changed = differences(broadcast_from_primary(lambda: ours), ours)
    changed = {n: v for n, v in changed.items() if not n.startswith(_OWN_FIELDS)}
    wanted = "the same config and the same data in all processes"
    fix = (
        "Start all of them with the same command, code and settings, on the same data."
    )
    check(not changed, wanted, fix, differences=changed)


def changed_fields(
    stored: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, tuple[object, object]]:
    """Returns the fields that shape a result and differ between two configs.

    Returns:
      Both values by dotted names. A field that one lacks has the base's value; a source
      that one does not know is not compared.
    """
    both = (shaping_fields(with_defaults(dict(side))) for side in (stored, config))
    return {
        name: values
        for name, values in differences(*both).items()
        if not (name.startswith("source.") and None in values)
    }


@functools.cache
def _versions() -> dict[str, str | None]:
    packages = {package: metadata.version(package) for package in _PACKAGES}
    return packages | {"commit": commit()}
