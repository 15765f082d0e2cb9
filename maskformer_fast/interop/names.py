"""Tensor names of one layout turned into those of another, by one table of rules that is read both ways.

::

    RULES = [
        Rule("encoder.layers.{i}.q_proj.{leaf}", "encoder.layers.{i}.in_proj_{leaf}", part=(0, 3)),
        Rule("encoder.layers.{i}.k_proj.{leaf}", "encoder.layers.{i}.in_proj_{leaf}", part=(1, 3)),
        Rule("encoder.layers.{i}.v_proj.{leaf}", "encoder.layers.{i}.in_proj_{leaf}", part=(2, 3)),
        Rule("criterion.empty_weight", None),
        Rule("sem_seg_head.{rest*}", "{rest*}"),
    ]
    renamed = to_ours(their_weights, RULES)  # the three projections are concatenated
    theirs = from_ours(network.state_dict(), RULES)  # and cut apart again

``{name}`` stands for one part of a dotted name (no dot in it), ``{name*}`` for one or more parts; both templates of a
rule have the same ones. The first rule that matches a name is the one that counts, so general ones stand last. Nothing
is raised here for a name that no rule knows: `Renamed.problems` lists all that is wrong, so that
`maskformer_fast.interop.architecture.check_fit` can show it with what else is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

_PLACEHOLDER = re.compile(r"\{(\w+)(\*?)\}")


class ConvertError(ValueError):
    """Weights that cannot be converted, with the file and every reason."""


@dataclass(frozen=True)
class Rule:
    """One line of a table: a template of their names, and of ours."""

    theirs: str
    ours: str | None
    """``None`` drops the tensor; there is no way back from that."""
    part: tuple[int, int] | None = None
    """``(i, n)``: theirs is the ``i``-th of ``n`` equal pieces of ours along the first dimension."""
    _patterns: tuple[re.Pattern[str], re.Pattern[str] | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [sorted(set(_PLACEHOLDER.findall(template))) for template in (self.theirs, self.ours) if template]
        if len(names) == 2 and names[0] != names[1]:
            raise ValueError(f"Rule: expected the same placeholders in {self.theirs!r} and {self.ours!r}")
        patterns = (_pattern(self.theirs), None if self.ours is None else _pattern(self.ours))
        object.__setattr__(self, "_patterns", patterns)

    def our_name(self, name: str) -> str | None:
        """Our name of their tensor; ``None`` where the rule does not match. A rule that drops gives ''."""
        match = self._patterns[0].fullmatch(name)
        return None if match is None else _fill(self.ours or "", match)

    def their_name(self, name: str) -> str | None:
        """Their name of our tensor; ``None`` where the rule does not match."""
        match = self._patterns[1].fullmatch(name) if self._patterns[1] else None
        return None if match is None else _fill(self.theirs, match)


class Renamed(NamedTuple):
    """Weights under new names, and what is wrong with them."""

    weights: dict[str, Tensor]
    origin: dict[str, str]
    """New name -> old one; of a concatenated tensor the old ones, joined by `` + ``."""
    problems: list[str]
    """Sentences that start with ``unknown: NAME``, ``missing: NAME``, ``shape: NAME`` or ``twice: NAME``."""


def to_ours(weights: Mapping[str, Tensor], rules: Sequence[Rule]) -> Renamed:
    """Their tensors under our names, in their order, the parts of packed ones concatenated along dimension 0."""
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    problems: list[str] = []
    pieces: dict[str, dict[int, str]] = {}
    counts: dict[str, int] = {}
    for name in weights:
        rule, target = _first(rules, name)
        if rule is None:
            problems.append(f"unknown: {name}")
        elif not target:
            continue
        elif rule.part is None:
            if target in origin:
                problems.append(f"twice: {origin[target]} and {name} are both {target}")
                continue
            renamed[target], origin[target] = weights[name], name
        else:
            index, counts[target] = rule.part
            found = pieces.setdefault(target, {})
            if index in found or target in renamed:
                problems.append(f"twice: {found.get(index, origin.get(target))} and {name} are both in {target}")
            found[index] = name
            origin[target] = name
    for target, found in pieces.items():
        names = [found[index] for index in sorted(found)]
        origin[target] = " + ".join(names)
        absent = [index for index in range(counts[target]) if index not in found]
        problems += [f"missing: {_sibling(rules, target, index)} (part of {target})" for index in absent]
        shapes = {tuple(weights[name].shape) for name in names}
        if len(shapes) > 1 or () in shapes:
            listed = ", ".join(f"{name} {tuple(weights[name].shape)}" for name in names)
            problems.append(f"shape: {listed}: expected equal shapes, for they are concatenated to {target}")
        elif not absent:
            renamed[target] = torch.cat([weights[name] for name in names])
    return Renamed(renamed, origin, problems)


def from_ours(weights: Mapping[str, Tensor], rules: Sequence[Rule]) -> Renamed:
    """Our tensors under their names: the inverse of `to_ours`, packed ones cut into their parts."""
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    problems: list[str] = []
    for name, tensor in weights.items():
        found = _all_parts(rules, name)
        if not found:
            problems.append(f"unknown: {name}")
        for target, part in found:
            if target in origin:
                problems.append(f"twice: {origin[target]} and {name} are both {target}")
                continue
            origin[target] = name
            if part is None:
                renamed[target] = tensor
            elif tensor.ndim == 0 or tensor.shape[0] % part[1]:
                problems.append(f"shape: {name}: expected a multiple of {part[1]} rows, got {tuple(tensor.shape)}")
            else:
                renamed[target] = tensor.chunk(part[1])[part[0]]
    return Renamed(renamed, origin, problems)


def their_name(rules: Sequence[Rule], name: str) -> str:
    """How their layout calls our tensor (its parts joined by `` + ``), for messages; our name where no rule knows."""
    return " + ".join(target for target, _ in _all_parts(rules, name)) or name


def _all_parts(rules: Sequence[Rule], name: str) -> list[tuple[str, tuple[int, int] | None]]:
    """Their names of one of our tensors, each with its part, in the order of the parts."""
    matches = [(rule.their_name(name), rule.part) for rule in rules]
    found = [(target, part) for target, part in matches if target is not None]
    if not found or found[0][1] is None:
        return found[:1]
    first: dict[int, tuple[str, tuple[int, int] | None]] = {}
    for target, part in found:
        if part is not None:
            first.setdefault(part[0], (target, part))
    return [first[index] for index in sorted(first)]


def _sibling(rules: Sequence[Rule], target: str, index: int) -> str:
    named = {part[0]: name for name, part in _all_parts(rules, target) if part is not None}
    return named.get(index, f"part {index}")


def _first(rules: Sequence[Rule], name: str) -> tuple[Rule | None, str]:
    for rule in rules:
        target = rule.our_name(name)
        if target is not None:
            return rule, target
    return None, ""


def _pattern(template: str) -> re.Pattern[str]:
    """Regular expression of a template; a placeholder used twice must stand for the same text."""
    parts, end, seen = [], 0, set()
    for found in _PLACEHOLDER.finditer(template):
        name, many = found.groups()
        parts.append(re.escape(template[end : found.start()]))
        parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{'.+' if many else '[^.]+'})")
        seen.add(name)
        end = found.end()
    return re.compile("".join(parts) + re.escape(template[end:]), re.DOTALL)


def _fill(template: str, match: re.Match[str]) -> str:
    return _PLACEHOLDER.sub(lambda found: match[found[1]], template)
