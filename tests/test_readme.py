"""The README: its length, a tree that equals the repository, and links of all pages that lead somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest

from tests.docs.pages import blocks, pages
from tests.docs.prose import broken_links
from tests.support.paths import ROOT

README = ROOT / "README.md"
MAX_LINES = 150


def read_tree(text: str) -> list[str]:
    """Return the paths of a tree: names apart by one space, then two spaces and a comment; two spaces indent."""
    paths: list[str] = []
    parents: list[str] = []
    for line in text.splitlines():
        names = re.split(r"  +", line.strip())[0].split(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], names[-1]]
        paths += ["/".join([*parents[:depth], name]) for name in names]
    return paths


def differences(paths: list[str], files: list[str]) -> list[str]:
    """Compare a tree with the repository's files: a folder of which it shows a part must be complete."""
    existing = {parent.as_posix() for file in files for parent in (PurePosixPath(file), *PurePosixPath(file).parents)}
    unfolded = {PurePosixPath(path).parent for path in paths}
    missing = {path for path in existing - {"."} if PurePosixPath(path).parent in unfolded} - set(paths)
    return [f"{path}: not in the repository" for path in sorted(set(paths) - existing)] + [
        f"{path}: not in the README's tree" for path in sorted(missing)
    ]


def tracked_files() -> list[str]:
    """List the files of the repository that git tracks and that exist."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_the_tree_equals_the_repository() -> None:
    (tree,) = (block.text for block in blocks(README) if block.language == "text" and "README.md" in block.text)
    paths = read_tree(tree)
    assert len(paths) == len(set(paths)) and "maskformer_fast/deploy/runtime" in paths
    assert not differences(paths, tracked_files())


def test_missing_and_superfluous_paths_of_a_tree_are_reported() -> None:
    paths = read_tree("a.md b.md  two pages\ncode  all of it\n  one.py\n  parts  unseen\n")
    assert paths == ["a.md", "b.md", "code", "code/one.py", "code/parts"]
    assert not differences(paths, ["a.md", "b.md", "code/one.py", "code/parts/deep/x.py"])
    assert differences(paths, ["a.md", "code/one.py", "code/two.py", "code/parts/x.py"]) == [
        "b.md: not in the repository", "code/two.py: not in the README's tree"]  # fmt: skip


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_links_lead_to_files_and_sections(page: Path) -> None:
    assert not broken_links(page)
