"""How often each machine instruction of a kernel runs, from the listing of ``nvdisasm -c -g``.

The listing has labels, branches, and the line of source of each instruction. Basic blocks and natural loops follow from
the branches. What the code does not tell, how often a loop repeats and how often a branch is taken, the caller says by
parts of lines of source:

    {"for start in tl.range(0, padded_classes": 5, "if area > 0:": 0.25}

- A loop has the trips of the line of its ``for``: iterations each time that it is reached, on average. Every loop needs
  an entry but those of at most `WAIT` instructions that belong to no ``for``: they wait for a barrier, once. Where the
  assembler unrolled a loop, the iterations are distributed to the copies of its body, the longest first.
- Another conditional branch has the fraction of its line: how often the longer of its two sides runs. Without an entry
  the longer side always runs, except one with a call: those are the slow paths of divisions.

Predicated instructions count in full: they are issued.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

_SOURCE = re.compile(r'\s*//## File "(.*?)", line (\d+)')
_LABEL = re.compile(r"\s*([.$\w]+):\s*$")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\(([.$\w]+)\)")
_ENDS = ("BRA", "EXIT", "RET", "CALL", "BRX", "JMP", "KILL")
_STATEMENTS = ("for ", "if ", "while ")
WAIT = 12
"""Most instructions of a loop that waits."""
_LOADS = ("LDG", "LDS", "LDGSTS", "LDSM", "LD")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    """With its modifiers: ``LDG.E.64``."""
    operands: str
    predicate: str
    """Empty for none."""
    source: tuple[str, int]
    """File and line."""

    @property
    def name(self) -> str:
        """Opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def jumps(self) -> bool:
        """Whether it is a branch or an exit. Far branches of sm_8x are calls of a label inside the function."""
        return self.name in ("BRA", "EXIT", "RET", "KILL") or (self.name == "CALL" and "`(.L" in self.operands)

    @property
    def conditional(self) -> bool:
        return bool(self.predicates) or self.opcode.startswith("BRA.DIV")

    @property
    def text(self) -> str:
        """Line of source, empty where the file is missing."""
        return linecache.getline(*self.source).strip()

    @property
    def predicates(self) -> set[str]:
        """Predicates that decide whether a branch is taken."""
        return set(re.findall(r"\bU?P\d", f"{self.predicate} {self.operands.split('`')[0]}"))

    @property
    def results(self) -> set[str]:
        """Predicates that it may write."""
        return {operand.strip() for operand in self.operands.split(",")[:2]}


@dataclass
class _Block:
    instructions: list[Instruction]
    following: int | None = None
    """Block that runs next where the last instruction is no taken branch."""
    target: int | None = None
    """Block of the branch's target, None for exits."""
    statement: Instruction | None = None
    """Instruction whose line of source is that of the branch's statement."""
    flow: dict[int, float] = field(default_factory=dict)
    """Blocks that run next -> how often, each time that this one runs."""

    @property
    def last(self) -> Instruction:
        return self.instructions[-1]

    @property
    def branches(self) -> bool:
        """Whether one of two ways is taken at the end."""
        return self.last.jumps and self.last.conditional


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of a listing in their order; labels -> index of the instruction after each."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source = ("", 0)
    for line in listing.splitlines():
        if match := _SOURCE.match(line):
            source = (match[1], int(match[2]))
        elif match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            instructions.append(Instruction(match[3], match[4], match[2] or "", source))
    if not instructions:
        raise ValueError("listing: expected instructions of `nvdisasm -c -g`, got none")
    return instructions, labels


def count_runs(listing: str, runs: Mapping[str, float]) -> list[tuple[Instruction, float]]:
    """Instructions with how often a warp runs each, on average; `runs` is described above.

    Raises ValueError for a loop without an entry, for an entry that fits no loop or branch, and for indirect branches.
    """
    instructions, labels = parse(listing)
    blocks = _blocks(instructions, labels)
    _Flow(blocks, runs).assign()
    matrix = np.eye(len(blocks))
    for index, block in enumerate(blocks):
        for other, times in block.flow.items():
            matrix[other, index] -= times
    entry = np.zeros(len(blocks))
    entry[0] = 1.0
    visits = np.linalg.solve(matrix, entry)
    return [(one, float(times)) for block, times in zip(blocks, visits, strict=True) for one in block.instructions]


def _blocks(instructions: list[Instruction], labels: dict[str, int]) -> list[_Block]:
    starts = {0, *labels.values()}
    starts |= {index + 1 for index, one in enumerate(instructions) if one.name in _ENDS}
    bounds = sorted(start for start in starts if start < len(instructions))
    number = {start: index for index, start in enumerate(bounds)}
    blocks = []
    for index, (start, end) in enumerate(zip(bounds, [*bounds[1:], len(instructions)], strict=True)):
        block = _Block(instructions[start:end])
        last = block.last
        if last.name in ("BRX", "JMP"):
            raise ValueError(f"branches: expected direct ones, got {last.opcode} {last.operands}")
        if not (last.jumps and not last.conditional) and index + 1 < len(bounds):
            block.following = index + 1
        if last.name in ("BRA", "CALL"):
            match = _TARGET.search(last.operands)
            if match is None:
                raise ValueError(f"branches: expected a label, got {last.opcode} {last.operands}")
            block.target = number.get(labels[match[1]])
        block.statement = _statement(instructions, end - 1)
        blocks.append(block)
    return blocks


@dataclass
class _Copy:
    """A loop, or a copy of a loop's body that runs at most once."""

    blocks: set[int]
    header: int | None
    guards: list[tuple[int, int]] = field(default_factory=list)
    """Branches that skip it, and the way of each that does not."""


def _statement(instructions: list[Instruction], index: int) -> Instruction:
    """Instruction of the ``for`` or ``if`` that a branch belongs to: itself, or a comparison that decides it.

    Newer assemblers give a branch the line of its block.
    """
    wanted = set(instructions[index].predicates)
    for other in (instructions[index], *reversed(instructions[max(0, index - 200) : index])):
        if other is instructions[index] or wanted & other.results:
            if other.text.startswith(_STATEMENTS):
                return other
            if other is not instructions[index]:
                wanted -= other.results
                wanted |= set(re.findall(r"\bU?P\d", other.operands.split(",", 2)[-1]))
    return instructions[index]


def _enclosing_loop(instruction: Instruction) -> Instruction:
    """The instruction with the line of the innermost ``for`` around its own line, or unchanged where there is none."""
    file, number = instruction.source
    indent = _indent(linecache.getline(file, number))
    while number > 1 and indent > 0:
        number -= 1
        line = linecache.getline(file, number)
        if line.strip() and _indent(line) < indent:
            indent = _indent(line)
            if line.strip().startswith("for "):
                return replace(instruction, source=(file, number))
    return instruction


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


class _Flow:
    """Decides how often each way out of each block is taken."""

    def __init__(self, blocks: list[_Block], runs: Mapping[str, float]) -> None:
        self.blocks = blocks
        self.runs = runs
        self.used: set[str] = set()
        self.ways = [[way for way in (b.following, b.target) if way is not None] for b in blocks]
        self.reached: dict[int, set[int]] = {}
        self.loops: dict[int, set[int]] = {}
        self.latches: dict[int, int] = {}
        """Headers of natural loops -> their blocks; the last block that jumps back."""
        used = self._reach(0)
        self.ways = [ways if index in used else [] for index, ways in enumerate(self.ways)]  # not the padding
        self.reached.clear()
        dominators = self._dominators()
        for index, ways in enumerate(self.ways):
            for header in ways:
                if header in dominators[index]:
                    self.loops.setdefault(header, {header}).update(self._body(header, index))
                    self.latches[header] = index

    def assign(self) -> None:
        for block, ways in zip(self.blocks, self.ways, strict=True):
            block.flow = dict.fromkeys(ways, 1.0)
        for latch in self.latches.values():
            statement = self._statement(latch)
            if not statement.text.startswith("for "):
                self.blocks[latch].statement = _enclosing_loop(statement)
        sources = {header: self._statement(latch).source for header, latch in self.latches.items()}
        guards: dict[tuple[str, int], list[tuple[int, int, set[int]]]] = {source: [] for source in sources.values()}
        for index, block in enumerate(self.blocks):
            if not (block.branches and self.ways[index]) or self._leaves_a_loop(index):
                continue
            longer, region = self._longer_side(index)
            statement = self._statement(index)
            if statement.source in guards:
                guards[statement.source].append((index, longer, region))
            else:
                self._choose(index, longer, self._given(statement, 1.0))
        for source, of_line in guards.items():
            headers = [header for header, line in sources.items() if line == source]
            statement = self._statement(self.latches[headers[0]])
            waits = not statement.text.startswith("for") and max(self._count(self.loops[h]) for h in headers) <= WAIT
            trips = self._given(statement, 1.0 if waits else None)
            for index, longer, _ in of_line:
                self._choose(index, longer, min(trips, 1.0))
            for copies in self._unrolled(headers, of_line):
                self._distribute(trips, copies)
        if unused := sorted(set(self.runs) - self.used):
            raise ValueError(f"runs: expected parts of lines with loops and branches, got {unused}; {self._known()}")

    def _statement(self, index: int) -> Instruction:
        return self.blocks[index].statement or self.blocks[index].last

    def _distribute(self, trips: float, copies: list[_Copy]) -> None:
        """Distribute a loop's iterations to copies of its body, each of which may be unrolled."""
        loads = [self._count(copy.blocks, _LOADS) for copy in copies]
        sizes = loads if min(loads) else [self._count(copy.blocks) for copy in copies]
        factors = [max(1, round(size / min(sizes))) for size in sizes]
        order = sorted(range(len(copies)), key=lambda i: (-factors[i], copies[i].header is None))
        for i in order:
            times = trips // factors[i] if factors[i] > 1 else trips
            if copies[i].header is None:
                times = min(times, 1.0)
            else:
                self._repeat(copies[i].header, max(times, 1.0))
            for index, way in copies[i].guards:
                self._choose(index, way, min(times, 1.0))
            trips -= times * factors[i]

    def _unrolled(self, headers: list[int], guards: list[tuple[int, int, set[int]]]) -> list[list[_Copy]]:
        """Loops and other copies of one ``for``, those of each place where it stands together."""
        copies = {header: _Copy(self.loops[header], header) for header in headers}
        for index, longer, region in guards:
            inside = [header for header in headers if header in region]
            if len(inside) == 1 and not any(other in region for other, *_ in guards if other != index):
                copies[inside[0]].guards.append((index, longer))
            elif not inside and any(self._is_copy(region, self.loops[header]) for header in headers):
                copies[min(region)] = _Copy(region, None, [(index, longer)])
        groups: list[list[_Copy]] = [[]]
        least = float("inf")  # of the group's loops, by instructions
        for _, copy in sorted(copies.items()):
            size = self._count(copy.blocks)
            if size * 3 > least * 2:  # a copy for the last iterations would be shorter
                groups.append([])
                least = float("inf")
            groups[-1].append(copy)
            if copy.header is not None:
                least = min(least, size)
        return groups

    def _is_copy(self, region: set[int], loop: set[int]) -> bool:
        """Whether a region repeats what a loop, or a half or quarter of an unrolled one, does: loads and all else."""
        loads, size = ([self._count(blocks, names) for blocks in (region, loop)] for names in (_LOADS, ()))
        factor = loads[1] / loads[0] if all(loads) else 0
        return factor.is_integer() and size[1] / size[0] < 1.5 * factor < 3 * size[1] / size[0] if factor else False

    def _repeat(self, header: int, trips: float) -> None:
        """Make a loop repeat so often each time that it is reached."""
        body, latch = self.loops[header], self.latches[header]
        exits = [index for index in body if self._leaves(index, body)]
        if not exits:
            raise ValueError(f"loops: expected an exit, got none at {self.blocks[latch].last.text!r}")
        main = latch if latch in exits else max(exits)
        for index in exits:
            stay = 1.0 if index != main else (trips - 1) / trips if index == latch else trips / (trips + 1)
            (inside,) = [way for way in self.ways[index] if way in body]
            self._choose(index, inside, stay)

    def _choose(self, index: int, way: int, fraction: float) -> None:
        block = self.blocks[index]
        for other in self.ways[index]:
            block.flow[other] = fraction if other == way else 1.0 - fraction

    def _leaves(self, index: int, body: set[int]) -> bool:
        """Whether a branch has one way inside a loop and one outside."""
        return self.blocks[index].branches and len({way in body for way in self.ways[index]}) == 2

    def _leaves_a_loop(self, index: int) -> bool:
        return any(index in body and self._leaves(index, body) for body in self.loops.values())

    def _longer_side(self, index: int) -> tuple[int, set[int]]:
        """The way of a branch with more instructions of its own before both meet, and the blocks of these."""
        block = self.blocks[index]
        if len(self.ways[index]) == 1:  # an exit
            return self.ways[index][0], self._reach(self.ways[index][0])
        first, second = self.ways[index]
        own = {first: self._reach(first) - self._reach(second), second: self._reach(second) - self._reach(first)}
        if block.last.opcode.startswith("BRA.DIV"):
            return first, own[first]
        calls = {
            way: any(self.blocks[b].last.name == "CALL" and not self.blocks[b].last.jumps for b in region)
            for way, region in own.items()
        }
        longer = max((first, second), key=lambda way: (not calls[way], self._count(own[way])))
        return longer, own[longer]

    def _count(self, blocks: set[int], names: tuple[str, ...] = ()) -> int:
        """Number of instructions, of some names or all."""
        return sum(not names or one.name in names for index in blocks for one in self.blocks[index].instructions)

    def _reach(self, index: int) -> set[int]:
        """Blocks that follow without repeating a loop, this one included."""
        if index not in self.reached:
            found, pending = {index}, [index]
            while pending:
                block = pending.pop()
                for way in self.ways[block]:
                    if way not in found and not (way in self.loops and block in self.loops[way]):
                        found.add(way)
                        pending.append(way)
            self.reached[index] = found
        return self.reached[index]

    def _dominators(self) -> list[set[int]]:
        before: list[list[int]] = [[] for _ in self.blocks]
        for index, ways in enumerate(self.ways):
            for way in ways:
                before[way].append(index)
        everything = set(range(len(self.blocks)))
        dominators = [{0}, *(set(everything) for _ in self.blocks[1:])]
        changed = True
        while changed:
            changed = False
            for index in range(1, len(self.blocks)):
                common = set.intersection(*(dominators[b] for b in before[index])) if before[index] else set()
                if common | {index} != dominators[index]:
                    dominators[index] = common | {index}
                    changed = True
        return dominators

    def _body(self, header: int, latch: int) -> set[int]:
        """Blocks of the natural loop of a jump back."""
        body, pending = {header, latch}, [latch] if latch != header else []
        while pending:
            block = pending.pop()
            for index, ways in enumerate(self.ways):
                if block in ways and index not in body:
                    body.add(index)
                    pending.append(index)
        return body

    def _given(self, branch: Instruction, default: float | None = None) -> float:
        """Entry of the branch's line; ValueError for none without a default."""
        fitting = [part for part in self.runs if part in branch.text]
        self.used.update(fitting)
        if fitting:
            return self.runs[max(fitting, key=len)]
        if default is None:
            raise ValueError(f"runs: expected an entry for the loop {branch.text!r} of {branch.source}")
        return default

    def _known(self) -> str:
        return "known are " + "; ".join(
            sorted({self._statement(i).text for i, block in enumerate(self.blocks) if block.branches})
        )
