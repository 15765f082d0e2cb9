"""Reader of the documentation: commands, Python and YAML in its blocks, links, and code in its prose.

The language of a fence is empty or ``sh`` (commands, one on each line), ``python``, ``yaml`` (a recipe), or one of
`LISTINGS`, which may contain no command. Any other language is an error, so that nothing stays unchecked by mistake.

A comment on the line before a fence, ``<!-- docs-check: parse, REASON -->``, excludes its commands from being run, for
the given reason; they are parsed instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

SHELL = ("", "sh")
LISTINGS = ("text", "json", "mermaid", "math")
PROGRAMS = ("python", "pip", "make", "torchrun", "docker", "cmake", "git")
"""Programs with which no line of a listing may begin, since commands in listings are not checked."""
_FENCE = re.compile(r"^(\s*)```+\s*(\S*)\s*$")
_COMMENT = re.compile(r"^<!-- docs-check: parse, (\S.*) -->$")


class PageError(ValueError):
    """A part of a page cannot be checked; the message has its place."""


@dataclass(frozen=True)
class Place:
    """A line of a page."""

    page: str  # relative to the repository
    line: int  # from 1

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Block:
    """A fenced block; its place is that of its first line."""

    place: Place
    language: str
    text: str
    reason: str  # why its commands cannot be run; empty if they can


@dataclass(frozen=True)
class Command:
    """One command of a shell block, with continued lines joined and without its comment."""

    place: Place
    text: str
    reason: str


def pages(root: Path = ROOT) -> list[Path]:
    """List the README and the pages of ``docs/``."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def blocks(path: Path, root: Path = ROOT) -> list[Block]:
    """Read the fenced blocks of a page.

    Raises:
        PageError: an unknown language, a fence that is not closed, a comment without a fence, a command in a listing.
    """
    name = path.relative_to(root).as_posix()
    result: list[Block] = []
    opened: tuple[Place, str, str, str] | None = None  # place of the next line, language, indentation, reason
    content: list[str] = []
    reason = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        place, fence = Place(name, number), _FENCE.match(line)
        if opened is not None:
            if fence and not fence[2]:
                result.append(Block(opened[0], opened[1], "\n".join(content), opened[3]))
                opened, content = None, []
            else:
                content.append(line.removeprefix(opened[2]))
        elif fence:
            if fence[2] not in (*SHELL, *LISTINGS, "python", "yaml"):
                raise PageError(f"{place}: expected a block of sh, python, yaml, {', '.join(LISTINGS)}, got {fence[2]}")
            opened, reason = (Place(name, number + 1), fence[2], fence[1], reason), ""
        elif comment := _COMMENT.match(line):
            reason = comment[1]
        elif re.match(r"\s*<!--\s*docs-check", line):
            raise PageError(f"{place}: expected <!-- docs-check: parse, REASON -->, got {line}")
        elif reason:
            raise PageError(f"{place}: expected a fenced block after the comment")
    if opened is not None:
        raise PageError(f"{opened[0]}: a fence that is not closed")
    for block in result:
        if block.language in LISTINGS:
            _refuse_commands(block)
    return result


def _refuse_commands(block: Block) -> None:
    for offset, line in enumerate(block.text.splitlines()):
        if line.split(" ")[0] in PROGRAMS:
            place = Place(block.place.page, block.place.line + offset)
            raise PageError(f"{place}: a command in a listing, where nothing checks it: {line}")


def commands(block: Block) -> list[Command]:
    """Read the commands of a shell block, without comments and empty lines.

    Raises:
        PageError: the last line is continued.
    """
    result, text, start = [], "", 0
    for offset, line in enumerate(block.text.splitlines()):
        start = start if text else offset
        text += re.sub(r"(^|\s)#.*$", "", line).rstrip()
        if text.endswith("\\"):
            text = f"{text[:-1].rstrip()} "
            continue
        if text.strip():
            place = Place(block.place.page, block.place.line + start)
            result.append(Command(place, " ".join(text.split()), block.reason))
        text = ""
    if text:
        raise PageError(f"{block.place}: the last line is continued, but nothing follows")
    return result


def inline_code(path: Path, root: Path = ROOT) -> list[tuple[Place, str]]:
    """Find code in the prose of a page; it may extend over several lines."""
    text = _without_blocks(path)
    name = path.relative_to(root).as_posix()
    return [
        (Place(name, text.count("\n", 0, match.start()) + 1), " ".join(match[1].split()))
        for match in re.finditer(r"(?<![`$])`([^`]+)`(?![`$])", text)
    ]


def links(path: Path, root: Path = ROOT) -> list[tuple[Place, str]]:
    """Find the targets of links to files and sections, and of pictures, without web addresses."""
    text = _without_blocks(path)
    name = path.relative_to(root).as_posix()
    targets = [(match.start(), match[1]) for match in re.finditer(r"\]\(([^)\s]+)\)", text)]
    targets += [(match.start(), match[1]) for match in re.finditer(r'<img [^>]*src="([^"]+)"', text)]
    return [(Place(name, text.count("\n", 0, at) + 1), target) for at, target in targets if "://" not in target]


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", _without_blocks(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def _without_blocks(path: Path) -> str:
    """Return a page's text with empty lines in place of its blocks, which keeps the line numbers."""
    lines, in_block = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        fence = bool(_FENCE.match(line))
        lines.append("" if in_block or fence else line)
        in_block ^= fence
    return "\n".join(lines)
