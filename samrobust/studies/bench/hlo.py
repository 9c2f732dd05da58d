"""Kernels of a compiled program, counted in its optimized HLO, as XLA prints it.

A kernel is an instruction that the device runs: a fusion, a library call, a copy; not
what only names memory (`tuple`, `bitcast`, `parameter`) or waits (`copy-done`). Its
bytes are those of its operands and results: what passes through memory if nothing stays
in a cache. Of a buffer that a fusion only slices or updates in place, the slice alone
counts; of a collective operation what each device brings, its operands.

A loop's body counts as often as it runs, and once where that hangs on the data: XLA
notes how often, or the condition compares a counter, from 0, with a constant. Of a
`conditional` the branch with the most bytes counts.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["KINDS", "Kernel", "Shape", "kernels"]

KINDS = ("reductions", "loop fusions", "convolutions", "collectives", "rest")


class Shape(NamedTuple):
    """An array's type and size, as in `bf16[128,32,32,64]`."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in memory; what is smaller than a byte takes one."""
        bits = re.search(r"\d+", self.dtype)
        width = max(8, int(bits[0])) // 8 if bits else 1  # pred
        return math.prod(self.dims) * width


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A piece of work that the device runs as one.

    Attributes:
      name: in the program.
      kind: of `KINDS`. A reduction is a fusion that sums or takes a maximum over an
        axis: BatchNorm's statistics and their gradients, nearly all of them.
      runs: in one call of the program.
      loop: the innermost loop that it stands in, its body's name; "" for none.
      num_bytes: read and written by a run.
      outputs: the shapes of its results.
      opcodes: of the instructions in it, without those that only name memory.
    """

    name: str
    kind: str
    runs: int
    loop: str
    num_bytes: int
    outputs: tuple[Shape, ...]
    opcodes: frozenset[str]


class _Instruction(NamedTuple):
    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def named(self, *attributes: str) -> list[str]:
        """Returns the computations that some attributes name."""
        found: list[str] = []
        for attribute in attributes:
            for match in re.findall(rf"\b{attribute}=({{[^}}]*}}|{_NAME})", self.rest):
                found += re.findall(_NAME, match)
        return [name.removeprefix("%") for name in found]

    @property
    def rest(self) -> str:
        """The attributes without the metadata, which may quote anything."""
        return self.attributes.partition(", metadata=")[0]


_NAME = r"%?[\w.\-]+"
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_HEAD = re.compile(rf"^(ENTRY )?({_NAME}) (?:\(.*\) -> .* )?{{$")
_LINE = re.compile(rf"^\s+(?:ROOT )?({_NAME}) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("opt-barrier", "partition-id", "replica-id", "async-update", "add-dependency"),
}
_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(-start)?"
)

_Computations = dict[str, list[_Instruction]]


def kernels(text: str) -> list[Kernel]:
    """Returns the kernels of a call of a program, those of loops once, with their runs.

    Args:
      text: of `jax.stages.Compiled.as_text()`.
    """
    computations, entry = _parse(text)
    return list(_walk(computations, entry, 1, ""))


def _parse(text: str) -> tuple[_Computations, str]:
    """Returns the instructions of every computation by name, and the entry's name."""
    computations: _Computations = {}
    current: list[_Instruction] = []
    entry = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2].removeprefix("%")
            current = computations[name] = []
            entry = name if head[1] else entry
        elif found := _LINE.match(line):
            current.append(_instruction(*found.groups()))
    return computations, entry


def _instruction(name: str, text: str) -> _Instruction:
    """Parses `SHAPES opcode(OPERANDS), ATTRIBUTES`."""
    text = re.sub(r"/\*.*?\*/", "", text)
    end = _closing(text) if text.startswith("(") else 0  # a tuple's shapes
    opcode = _OPCODE.search(text, end)
    if opcode is None:
        raise ValueError(f"Expected an HLO instruction, got {text[:200]!r}.")
    start = opcode.end() - 1
    close = start + _closing(text[start:])
    is_number = opcode[1] in ("parameter", "constant")
    names = r"\((\d+)\)" if is_number else r"%([\w.\-]+)"
    return _Instruction(
        name.removeprefix("%"),
        _shapes(text[: opcode.start(1)]),
        opcode[1],
        tuple(re.findall(names, text[start:close])),
        text[close:],
    )


def _closing(text: str) -> int:
    """Returns the place behind the bracket that closes the first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _shapes(text: str) -> tuple[Shape, ...]:
    """Returns the arrays of a type, those of a tuple one by one."""
    return tuple(
        Shape(dtype, tuple(map(int, filter(None, dims.split(",")))))
        for dtype, dims in _SHAPE.findall(text)
    )


def _walk(
    computations: _Computations, name: str, runs: int, loop: str
) -> Iterator[Kernel]:
    """Yields the kernels of a computation and of all that it calls."""
    instructions = computations[name]
    by_name = {each.name: each for each in instructions}
    for each in instructions:
        if each.opcode == "while":
            (body,) = each.named("body")
            times = runs * _trips(computations, each)
            yield from _walk(computations, body, times, body)
        elif each.opcode in ("call", "async-start"):
            for called in each.named("to_apply", "calls"):
                yield from _walk(computations, called, runs, loop)
        elif each.opcode == "conditional":
            fields = "branch_computations", "true_computation", "false_computation"
            branches = [
                list(_walk(computations, branch, runs, loop))
                for branch in each.named(*fields)
            ]
            yield from max(branches, key=lambda found: sum(k.num_bytes for k in found))
        elif each.opcode not in _NO_KERNEL and not each.opcode.endswith("-done"):
            yield _kernel(computations, by_name, each, runs, loop)


def _trips(computations: _Computations, loop: _Instruction) -> int:
    """Returns how often a loop runs: as XLA notes, or up to what its condition says."""
    if known := _TRIPS.search(loop.attributes):
        return int(known[1])
    condition = computations[loop.named("condition")[0]]
    constants = {each.name: each.operands for each in condition}
    test = condition[-1]
    if test.opcode == "compare" and "direction=LT" in test.rest:
        limit = constants.get(test.operands[1], ())
        if len(limit) == 1 and limit[0].isdigit():
            return int(limit[0])
    return 1


def _kernel(
    computations: _Computations,
    by_name: dict[str, _Instruction],
    each: _Instruction,
    runs: int,
    loop: str,
) -> Kernel:
    """Describes an instruction as a kernel."""
    is_fusion = each.opcode == "fusion"
    inside = computations[each.named("calls")[0]] if is_fusion else [each]
    opcodes = frozenset(i.opcode for i in inside if i.opcode not in _NO_KERNEL)
    inputs = [sum(s.num_bytes for s in by_name[n].shapes) for n in each.operands]
    outputs = each.shapes[: 1 if each.opcode == "copy-start" else None]
    written = sum(shape.num_bytes for shape in outputs)
    for position, (read, saved) in _sliced(inside).items() if is_fusion else ():
        inputs[position] = min(inputs[position], read)
        written -= saved
    kind = _kind(each, opcodes)
    return Kernel(
        each.name,
        kind,
        runs,
        loop,
        sum(inputs) + (written if kind != "collectives" else 0),
        outputs,
        opcodes,
    )


def _kind(each: _Instruction, opcodes: frozenset[str]) -> str:
    if _COLLECTIVE.fullmatch(each.opcode):
        return "collectives"
    target = re.search(r'custom_call_target="([^"]*)"', each.attributes)
    if "convolution" in opcodes or (target and "conv" in target[1]):
        return "convolutions"
    if "reduce" in opcodes:
        return "reductions"
    return "loop fusions" if "kind=kLoop" in each.rest else "rest"


def _sliced(inside: list[_Instruction]) -> dict[int, tuple[int, int]]:
    """Returns the operands of a fusion that it does not pass over as a whole.

    By position: the bytes that are read of it, and those of a result that are not
    written since it is updated in place.
    """
    sizes = {each.name: sum(s.num_bytes for s in each.shapes) for each in inside}
    root = inside[-1]
    results = {root.name, *(root.operands if root.opcode == "tuple" else ())}
    found = {}
    for parameter in inside:
        name = parameter.name
        users = [each for each in inside if name in each.operands]
        if parameter.opcode != "parameter" or any(
            each.operands.index(name) for each in users
        ):
            continue
        how = {each.opcode for each in users}
        if how <= {"dynamic-slice", "gather"}:
            read, saved = sum(sizes[each.name] for each in users), 0
        elif how == {"dynamic-update-slice"} and {u.name for u in users} <= results:
            updates = sum(sizes[each.operands[1]] for each in users)
            read, saved = 0, sizes[name] - updates
        else:
            continue
        found[int(parameter.operands[0])] = read, saved
    return found
