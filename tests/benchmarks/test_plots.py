"""Pictures of the results: which are drawn from what, the same bytes each time, and clear words about bad files."""

from __future__ import annotations

import json
import logging
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks import plots

SCALING = {"latency_by_classes", "latency_by_resolution", "latency_by_batch", "latency_by_queries", "memory", "scaling"}


def curve(name: str, axis: str, peer: str = "Hugging Face", memory: bool = False, **changes: Any) -> dict[str, Any]:
    """With a slow peer, whose largest point was left out, and a point that was not measured at all."""
    points: list[dict[str, Any]] = [
        {"x": x, "label": f"{x} of them", "ours_ms": 3.0 + 0.01 * x, "peer_ms": 2.0 * x if x < 500 else None}
        for x in (19, 50, 150, 847)
    ] + [{"x": 2000, "label": "2 000", "ours_ms": None, "peer_ms": None, "skipped": "would take long"}]
    if memory:
        for point in points[:3]:
            point |= {"ours_peak_mib": 0.0, "peer_peak_mib": 0.5 * point["x"]}
    row = {"name": name, "subject": "operators", "axis": axis, "unit": axis, "peer": peer, "points": points,
           "ours_exponent": 0.21, "ours_exponent_error": 0.02, "peer_exponent": 0.97, "peer_exponent_error": 0.01,
           "fit": "log-log least squares over points 50..847"}  # fmt: skip
    return row | changes


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all three files."""
    folder = tmp_path_factory.mktemp("results")
    curves = [
        curve("labels by classes", "classes", memory=True),
        curve("labels by classes, formula", "classes", "official formula, eager PyTorch"),
        curve("network by resolution", "pixels", peer_exponent=None, peer_exponent_error=None),
        curve("labels by batch", "batch"), curve("matching by targets", "targets"),
        curve("assignment by queries", "queries", "SciPy"),
    ]  # fmt: skip
    rows = [
        {"name": f"row {k}", "subject": subject, "peer": peer, "ratio": ratio, "ours_peak_mib": ours,
         "peer_peak_mib": theirs}
        for k, (subject, peer, ratio, ours, theirs) in enumerate([
            ("operators", "transformers", 12.0, 0.0, 100.0), ("operators", "transformers", 3.0, 10.0, 100.0),
            ("train_step", "a peer whose name goes on and on and on, beyond any margin", 1.5, None, None),
        ])
    ] + [{"name": "failed", "peer": "nobody", "ratio": None, "error": "time: no such peer"}]  # fmt: skip
    stages = {"decode": 6.0, "resize": 4.0, "backbone": 250.0, "pixel_decoder": 160.0, "transformer": 30.0,
              "heads": 20.0, "postprocess": 170.0, "write": 5.0}  # fmt: skip
    sides = {"ours": {"stages_ms": stages | {"postprocess": 5.0}}, "Hugging Face": {"stages_ms": stages},
             "compiled": {"images_per_second": 2.0, "stages_ms": None}}  # fmt: skip
    for name, content in (
        ("scaling", {"curves": curves}), ("cpu", {"rows": rows}),
        ("end_to_end", {"rows": [{"name": "K=150, fp32", "sides": sides}, {"name": "K=847", "error": "failed"}]}),
    ):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps({"machine": {}, **content}))
    return folder


@pytest.fixture(scope="module")
def drawn(results: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("drawn")
    assert plots.main(["--results", str(results), "--output", str(folder)]) == 0
    return {path.stem: path.read_bytes() for path in folder.iterdir()}


def test_every_picture(drawn: dict[str, bytes]) -> None:
    assert set(drawn) == SCALING | {"speedups", "stages"}
    for name, content in drawn.items():
        root = ElementTree.fromstring(content)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert 780 <= float(root.attrib["width"].removesuffix("pt")) / 0.75 <= 820, "as wide as a README, in pixels"
        assert 150 <= float(root.attrib["height"].removesuffix("pt")) / 0.75 <= 1000, name
        assert len(content) < 300_000 and b"dc:date" not in content


@pytest.mark.parametrize(
    ("picture", "texts"),  # matplotlib writes each text as paths, after a comment that has it in words
    [
        ("latency_by_classes", ["labels by classes", "150 of them", "official formula, eager PyTorch", "Hugging Face"]),
        ("latency_by_resolution", ["network by resolution", "ours"]),
        ("latency_by_queries", ["assignment by queries", "matching by targets", "SciPy"]),
        ("memory", ["labels by classes", "MiB a call adds"]),
        ("scaling", ["labels by batch", "constant", "proportional", "ours", "Hugging Face", "SciPy"]),
        ("speedups", ["operators: transformers", "train step: a peer whose name", "peak memory: peer's / ours"]),
        ("stages", ["K=150, fp32, ours", "K=150, fp32, Hugging Face", "pixel decoder", "645 ms", "480 ms", "26 %"]),
    ],
)
def test_words_of_a_picture(drawn: dict[str, bytes], picture: str, texts: list[str]) -> None:
    content = drawn[picture].decode()
    assert not [text for text in texts if f"<!-- {text}" not in content]


def test_same_results_give_the_same_bytes(
    results: Path, drawn: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever time it is, and whatever style the user has set."""
    some = {"scaling.json": ("latency_by_classes", "scaling"), "end_to_end.json": ("stages",)}  # one of each kind
    chosen = {name: {picture: plots.PICTURES[name][picture] for picture in own} for name, own in some.items()}
    monkeypatch.setattr(plots, "PICTURES", chosen)
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 7, "svg.fonttype": "none"}):
        paths = plots.draw_all(results, tmp_path / "new" / "folder")
    assert [path.stem for path in paths] == ["latency_by_classes", "scaling", "stages"]
    assert all(path.read_bytes() == drawn[path.stem] for path in paths)


def test_missing_files_leave_their_pictures(results: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "plots").mkdir()
    for name in ("stages", "memory"):
        (tmp_path / "plots" / f"{name}.svg").write_text("as it was")
    (tmp_path / "scaling.json").write_text(json.dumps({"curves": [curve("alone", "batch")]}))
    with caplog.at_level(logging.INFO):
        assert plots.main(["--results", str(tmp_path)]) == 0
    written = {path.stem for path in (tmp_path / "plots").iterdir() if path.read_text() != "as it was"}
    assert written == {"latency_by_batch", "scaling"}
    assert f"{tmp_path / 'end_to_end.json'} is missing: stages stay as they are" in caplog.text
    assert f"{tmp_path / 'cpu.json'} is missing: speedups stay as they are" in caplog.text
    assert "scaling.json has nothing for memory, which stays as it is" in caplog.text


def test_no_results_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"results: expected a folder with one of scaling.json, cpu.json, .*, got"):
        plots.main(["--results", str(tmp_path)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "expected JSON, got"),
        ("[1, 2]", "expected an object with the list 'curves', got [1, 2]"),
        ('{"rows": []}', "expected an object with the list 'curves', got {'rows': []}"),
        ('{"curves": [{"axis": "classes"}]}', "expected what its benchmark writes, got KeyError('points')"),
        ('{"curves": [7]}', "expected what its benchmark writes, got TypeError"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "scaling.json").write_text(text)
    with pytest.raises(ValueError) as error:
        plots.draw_all(tmp_path, tmp_path / "plots")
    assert str(error.value).startswith(f"{tmp_path / 'scaling.json'}: {said}")
    assert not (tmp_path / "plots").exists()


def test_colours_differ_in_brightness_or_shape() -> None:
    """Peers that share a picture differ in colour, marker and line."""
    styles = [plots.OUR_STYLE, *(plots.side_style("peer", peer) for peer in ("Hugging Face", "official", "SciPy"))]
    for key in ("color", "marker", "linestyle"):
        assert len({style[key] for style in styles}) == 4
    assert len(set(plots.STAGE_COLORS.values())) == len(plots.STAGE_COLORS)
