"""The documentation as a list of things to check: commands, Python and YAML of its blocks, links, code in its prose.

A fence says what it holds: nothing or ``sh`` (commands, one a line), ``python``, ``yaml`` (a recipe), or a listing
(`LISTINGS`), which may hold no command. Anything else is an error, so that nothing is left out without a word.

A comment on the line before a fence, ``<!-- docs-check: parse, REASON -->``, says that its commands can not be run
where the documentation is checked, and why; they are parsed then.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

SHELL = ("", "sh")
LISTINGS = ("text", "json", "mermaid", "math")
PROGRAMS = ("python", "pip", "make", "torchrun", "docker", "cmake", "git")
"""No line of a listing may begin with one of them: it would be a command that nobody checks."""
_FENCE = re.compile(r"^(\s*)```+\s*(\S*)\s*$")
_MARK = re.compile(r"^<!-- docs-check: parse, (\S.*) -->$")


class PageError(ValueError):
    """Something on a page that can not be checked, with its place."""


@dataclass(frozen=True)
class Place:
    page: str  # relative to the repository
    line: int  # from 1

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Block:
    """A fenced block: its place is that of its first line."""

    place: Place
    language: str
    text: str
    reason: str  # why its commands can not be run; empty where they can


@dataclass(frozen=True)
class Command:
    """One command of a shell block, its continued lines joined and its comment left out."""

    place: Place
    text: str
    reason: str


def pages(root: Path = ROOT) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def blocks(path: Path, root: Path = ROOT) -> list[Block]:
    """Fenced blocks of a page.

    Raises:
        PageError: an unknown language, a fence that is not closed, a mark without a fence, a listing with a command.
    """
    name = path.relative_to(root).as_posix()
    found: list[Block] = []
    opened: tuple[Place, str, str, str] | None = None  # place of the next line, language, indentation, reason
    content: list[str] = []
    reason = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        place, fence = Place(name, number), _FENCE.match(line)
        if opened is not None:
            if fence and not fence[2]:
                found.append(Block(opened[0], opened[1], "\n".join(content), opened[3]))
                opened, content = None, []
            else:
                content.append(line.removeprefix(opened[2]))
        elif fence:
            if fence[2] not in (*SHELL, *LISTINGS, "python", "yaml"):
                raise PageError(f"{place}: expected a block of sh, python, yaml, {', '.join(LISTINGS)}, got {fence[2]}")
            opened, reason = (Place(name, number + 1), fence[2], fence[1], reason), ""
        elif mark := _MARK.match(line):
            reason = mark[1]
        elif re.match(r"\s*<!--\s*docs-check", line):
            raise PageError(f"{place}: expected <!-- docs-check: parse, REASON -->, got {line}")
        elif reason:
            raise PageError(f"{place}: expected a fenced block after the mark")
    if opened is not None:
        raise PageError(f"{opened[0]}: a fence that is not closed")
    for block in found:
        if block.language in LISTINGS:
            _refuse_commands(block)
    return found


def _refuse_commands(block: Block) -> None:
    for offset, line in enumerate(block.text.splitlines()):
        if line.split(" ")[0] in PROGRAMS:
            place = Place(block.place.page, block.place.line + offset)
            raise PageError(f"{place}: a command in a listing, where nothing checks it: {line}")


def commands(block: Block) -> list[Command]:
    """Commands of a shell block; comments and empty lines are left out."""
    found, text, start = [], "", 0
    for offset, line in enumerate(block.text.splitlines()):
        start = start if text else offset
        text += re.sub(r"(^|\s)#.*$", "", line).rstrip()
        if text.endswith("\\"):
            text = f"{text[:-1].rstrip()} "
            continue
        if text.strip():
            place = Place(block.place.page, block.place.line + start)
            found.append(Command(place, " ".join(text.split()), block.reason))
        text = ""
    if text:
        raise PageError(f"{block.place}: the last line is continued, but nothing follows")
    return found


def inline_code(path: Path, root: Path = ROOT) -> list[tuple[Place, str]]:
    """Code within the prose of a page, whole lines of which it may span."""
    text = _without_blocks(path)
    name = path.relative_to(root).as_posix()
    return [
        (Place(name, text.count("\n", 0, match.start()) + 1), " ".join(match[1].split()))
        for match in re.finditer(r"(?<![`$])`([^`]+)`(?![`$])", text)
    ]


def links(path: Path, root: Path = ROOT) -> list[tuple[Place, str]]:
    """Targets of links to files and to sections, and of pictures; web addresses are left out."""
    text = _without_blocks(path)
    name = path.relative_to(root).as_posix()
    targets = [(match.start(), match[1]) for match in re.finditer(r"\]\(([^)\s]+)\)", text)]
    targets += [(match.start(), match[1]) for match in re.finditer(r'<img [^>]*src="([^"]+)"', text)]
    return [(Place(name, text.count("\n", 0, at) + 1), target) for at, target in targets if "://" not in target]


def anchors(path: Path) -> set[str]:
    """Names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", _without_blocks(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def _without_blocks(path: Path) -> str:
    """A page's text with the lines of its blocks empty, so that places stay what they are."""
    lines, inside = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        fence = bool(_FENCE.match(line))
        lines.append("" if inside or fence else line)
        inside ^= fence
    return "\n".join(lines)
