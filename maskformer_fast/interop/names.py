"""Renaming of tensors from one layout to another, by one table of rules that is read in both directions.

::

    RULES = [
        Rule("encoder.layers.{i}.q_proj.{leaf}", "encoder.layers.{i}.in_proj_{leaf}", part=(0, 3)),
        Rule("encoder.layers.{i}.k_proj.{leaf}", "encoder.layers.{i}.in_proj_{leaf}", part=(1, 3)),
        Rule("encoder.layers.{i}.v_proj.{leaf}", "encoder.layers.{i}.in_proj_{leaf}", part=(2, 3)),
        Rule("criterion.empty_weight", None),
        Rule("sem_seg_head.{rest*}", "{rest*}"),
    ]
    renamed = to_ours(their_weights, RULES)  # the three projections are concatenated
    theirs = from_ours(network.state_dict(), RULES)  # and split again

``{name}`` stands for one part of a dotted name (without dots), ``{name*}`` for one or more parts; both templates of a
rule have the same placeholders. The first rule that matches a name is applied, so general rules stand last. Unknown
names raise no error here: `Renamed.problems` lists all problems, and `maskformer_fast.interop.architecture.check_fit`
reports them together with others.
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
    """Weights that cannot be converted. The message has the file and every reason."""


@dataclass(frozen=True)
class Rule:
    """One line of a table: a template of their names and one of ours."""

    theirs: str
    ours: str | None
    """``None`` drops the tensor, which cannot be undone."""
    part: tuple[int, int] | None = None
    """``(i, n)``: their tensor is number ``i`` of ``n`` equal parts of ours along the first dimension."""
    _patterns: tuple[re.Pattern[str], re.Pattern[str] | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [sorted(set(_PLACEHOLDER.findall(template))) for template in (self.theirs, self.ours) if template]
        if len(names) == 2 and names[0] != names[1]:
            raise ValueError(f"Rule: expected the same placeholders in {self.theirs!r} and {self.ours!r}")
        patterns = (_pattern(self.theirs), None if self.ours is None else _pattern(self.ours))
        object.__setattr__(self, "_patterns", patterns)

    def our_name(self, name: str) -> str | None:
        """Our name of their tensor; ``None`` where the rule does not match, empty where it drops the tensor."""
        match = self._patterns[0].fullmatch(name)
        return None if match is None else _fill(self.ours or "", match)

    def their_name(self, name: str) -> str | None:
        """Their name of our tensor; ``None`` where the rule does not match."""
        match = self._patterns[1].fullmatch(name) if self._patterns[1] else None
        return None if match is None else _fill(self.theirs, match)


class Renamed(NamedTuple):
    """Weights under new names, and their problems."""

    weights: dict[str, Tensor]
    origin: dict[str, str]
    """New name -> old name; for a concatenated tensor the old names, joined by `` + ``."""
    problems: list[str]
    """Texts that start with ``unknown: NAME``, ``missing: NAME``, ``shape: NAME`` or ``twice: NAME``."""


def to_ours(weights: Mapping[str, Tensor], rules: Sequence[Rule]) -> Renamed:
    """Rename their tensors to ours, in their order. Parts of packed tensors are concatenated along dimension 0."""
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
            parts = pieces.setdefault(target, {})
            if index in parts or target in renamed:
                problems.append(f"twice: {parts.get(index, origin.get(target))} and {name} are both in {target}")
            parts[index] = name
            origin[target] = name
    for target, parts in pieces.items():
        names = [parts[index] for index in sorted(parts)]
        origin[target] = " + ".join(names)
        absent = [index for index in range(counts[target]) if index not in parts]
        problems += [f"missing: {_sibling(rules, target, index)} (part of {target})" for index in absent]
        shapes = {tuple(weights[name].shape) for name in names}
        if len(shapes) > 1 or () in shapes:
            listed = ", ".join(f"{name} {tuple(weights[name].shape)}" for name in names)
            problems.append(f"shape: {listed}: expected equal shapes, for they are concatenated to {target}")
        elif not absent:
            renamed[target] = torch.cat([weights[name] for name in names])
    return Renamed(renamed, origin, problems)


def from_ours(weights: Mapping[str, Tensor], rules: Sequence[Rule]) -> Renamed:
    """Rename our tensors to theirs and split packed tensors: the inverse of `to_ours`."""
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    problems: list[str] = []
    for name, tensor in weights.items():
        targets = _all_parts(rules, name)
        if not targets:
            problems.append(f"unknown: {name}")
        for target, part in targets:
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
    """Their name of our tensor for messages (parts joined by `` + ``); our name where no rule matches."""
    return " + ".join(target for target, _ in _all_parts(rules, name)) or name


def _all_parts(rules: Sequence[Rule], name: str) -> list[tuple[str, tuple[int, int] | None]]:
    """Their names of one of our tensors, each with its part, in the order of the parts."""
    names = [(rule.their_name(name), rule.part) for rule in rules]
    matches = [(target, part) for target, part in names if target is not None]
    if not matches or matches[0][1] is None:
        return matches[:1]
    first: dict[int, tuple[str, tuple[int, int] | None]] = {}
    for target, part in matches:
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
    """Regular expression of a template. A placeholder that stands twice must match the same text."""
    parts, end, seen = [], 0, set()
    for placeholder in _PLACEHOLDER.finditer(template):
        name, many = placeholder.groups()
        parts.append(re.escape(template[end : placeholder.start()]))
        parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{'.+' if many else '[^.]+'})")
        seen.add(name)
        end = placeholder.end()
    return re.compile("".join(parts) + re.escape(template[end:]), re.DOTALL)


def _fill(template: str, match: re.Match[str]) -> str:
    return _PLACEHOLDER.sub(lambda placeholder: match[placeholder[1]], template)
