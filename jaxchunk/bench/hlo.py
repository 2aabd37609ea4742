"""Proof from the compiled program that the chunks of the microbenchmark, and its softmax, are still there."""

import dataclasses
import re
from collections.abc import Iterator

import jax

from jaxchunk.bench.softmax_kernel import KERNEL_NAME


def surviving_chunks(compiled: jax.stages.Compiled, gemms_per_chunk: int = 2) -> int | None:
    """How often the compiled program runs the workload's GEMMs (two, or three in the LM head): its number of chunks.

    That is the trip count of the loop that holds them (once for each set, if the compiler unrolled some), or 1 where
    they stand outside of loops. None where the program's text does not tell: a GEMM is missing, or stands alone in a
    loop, or a trip count is not known.
    """
    program = _Program.of(compiled.as_text() or "")
    loops = [(runs, gemms) for runs, gemms in program.loops(program.entry) if gemms]
    if not loops or any(runs is None or gemms % gemms_per_chunk for runs, gemms in loops):
        return None
    return sum((runs or 0) * gemms // gemms_per_chunk for runs, gemms in loops)


def softmax_survived(compiled: jax.stages.Compiled) -> bool:
    """Whether the result of the compiled program comes from a GEMM of exponentials of a GEMM.

    A Pallas kernel that Triton compiles counts as exponentials: its arithmetic does not show in the program's text.
    """
    program = _Program.of(compiled.as_text() or "")
    return _furthest([program.stage(program.entry, [])]) == _ACCUMULATED


def softmax_kernels(compiled: jax.stages.Compiled) -> frozenset[str]:
    """Names under which a profiler shows the GPU kernels of the softmax.

    Those are the Pallas kernel, and fusions of XLA's with an exponential or a reduction but no GEMM. XLA names a
    fusion's kernel after it, with underscores for what C does not allow in a name.
    """
    program, names = _Program.of(compiled.as_text() or ""), {KERNEL_NAME}
    for instruction in (i for computation in program.computations.values() for i in computation):
        if instruction.opcode == "fusion":
            inner = [i for name in instruction.called for i in program.computations.get(name, [])]
            if any(i.is_softmax or i.opcode == "reduce" for i in inner) and not any(i.is_gemm for i in inner):
                names.add(re.sub(r"\W", "_", instruction.name.removeprefix("%")))
    return frozenset(names)


# How far a value has come: it depends on nothing of these, on a GEMM, on exponentials of that, on a GEMM of those.
_OPERAND, _LOGITS, _SOFTMAX, _ACCUMULATED = range(4)
_Stage = int | tuple[int, ...]  # of an array, or of each element of a tuple


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """An instruction of an HLO program; `arguments` and `attributes` are text."""

    name: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%[\w.\-]+", self.arguments)

    @property
    def called(self) -> list[str]:
        """Computations that it runs, a loop's condition excepted."""
        single = re.findall(
            r"\b(?:calls|to_apply|body|true_computation|false_computation)=(%[\w.\-]+)", self.attributes
        )
        lists = re.findall(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}", self.attributes)
        return single + re.findall(r"%[\w.\-]+", " ".join(lists))

    @property
    def target(self) -> str:
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found and self.opcode.startswith("custom-call") else ""

    @property
    def is_gemm(self) -> bool:
        return self.opcode == "dot" or re.search("cublas|gemm|matmul", self.target) is not None

    @property
    def is_softmax(self) -> bool:
        return self.opcode == "exponential" or "triton" in self.target

    @property
    def trip_count(self) -> int | None:
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.attributes)
        return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class _Program:
    """An optimised HLO program: its computations by name, each in the order in which it is run; the root is last."""

    computations: dict[str, list[_Instruction]]
    entry: str

    @classmethod
    def of(cls, text: str) -> "_Program":
        blocks = re.findall(r"^(ENTRY )?(%[\w.\-]+) .*?\{\n(.*?)^\}", text, re.M | re.S)
        instruction = re.compile(
            r"^ *(?:ROOT )?(%[\w.\-]+) = (?:\(.*?\)|\S+) ([a-z][\w\-]*)\(((?:[^()]|\([^()]*\))*)\)(.*)$", re.M
        )
        entries = [name for entry, name, _ in blocks if entry]
        computations = {name: [_Instruction(*found) for found in instruction.findall(body)] for _, name, body in blocks}
        return cls(computations, entries[0] if entries else "")

    def loops(self, name: str, runs: int | None = 1) -> Iterator[tuple[int | None, int]]:
        """Runs and GEMMs of a computation outside of its loops, and of every loop in it (None: not known)."""
        gemms, queue = 0, [name]
        while queue:
            for instruction in self.computations.get(queue.pop(), []):
                if instruction.opcode == "while":
                    trips = instruction.trip_count
                    for body in instruction.called:
                        yield from self.loops(body, None if runs is None or trips is None else runs * trips)
                elif instruction.is_gemm:
                    gemms += 1
                else:
                    queue += instruction.called
        yield runs, gemms

    def stage(self, name: str, arguments: list[_Stage]) -> _Stage:
        """How far the result of a computation has come, given its arguments. A loop is gone through once."""
        stages: dict[str, _Stage] = {}
        result: _Stage = _OPERAND
        for instruction in self.computations.get(name, []):
            inputs = [stages[operand] for operand in instruction.operands if operand in stages]
            result = stages[instruction.name] = self._stage_of(instruction, inputs, arguments)
        return result

    def _stage_of(self, instruction: _Instruction, inputs: list[_Stage], arguments: list[_Stage]) -> _Stage:
        before = _furthest(inputs)
        match instruction.opcode:
            case "parameter":
                index = int(instruction.arguments)
                return arguments[index] if index < len(arguments) else _OPERAND
            case "tuple":
                return tuple(_furthest([stage]) for stage in inputs)
            case "get-tuple-element":
                (stage,) = inputs
                index = int(re.findall(r"index=(\d+)", instruction.attributes)[0])
                return stage[index] if isinstance(stage, tuple) else stage
            case "while" | "fusion" | "call" | "async-start" if instruction.called:
                return self.stage(instruction.called[0], inputs)
            case "conditional":
                branches = zip(instruction.called, inputs[1:], strict=True)
                return _furthest([self.stage(branch, [stage]) for branch, stage in branches])
        if instruction.is_gemm:
            return _ACCUMULATED if before >= _SOFTMAX else _LOGITS
        return _SOFTMAX if instruction.is_softmax and before == _LOGITS else before


def _furthest(stages: list[_Stage]) -> int:
    return max((max(s, default=_OPERAND) if isinstance(s, tuple) else s for s in stages), default=_OPERAND)
