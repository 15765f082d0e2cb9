"""Reading of videos: times, rotation, start and end, damage, hostile files, and what is taken for a video."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from maskformer_fast.video.options import VideoOptions
from maskformer_fast.video.reader import Picture, Sound, VideoError, VideoReader
from maskformer_fast.video.sources import container_format, find_videos, is_cut_short, source_of
from tests.support.clips import flip_bytes, frame_times, sound_packets, turn, write_clip
from tests.support.memory import at_most

av = pytest.importorskip("av")


def read(path: Path | str, **options: object) -> tuple[list[Picture], list[Sound], VideoReader]:
    opened = VideoReader(source_of(path), VideoOptions(**options))
    items = list(opened)
    opened.close()
    pictures = [item for item in items if isinstance(item, Picture)]
    return pictures, [item for item in items if isinstance(item, Sound)], opened


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.mkv", "a.mov"])
def test_every_frame_has_the_time_that_ffprobe_gives_it(tmp_path: Path, name: str) -> None:
    path = write_clip(tmp_path / name, 30)
    pictures, _, opened = read(path)
    assert [picture.time for picture in pictures] == pytest.approx(frame_times(path), abs=1e-9)
    assert [picture.number for picture in pictures] == list(range(30))
    assert opened.counts.damaged == 0 and opened.problem is None


def test_variable_frame_rates_keep_their_times(tmp_path: Path) -> None:
    times = np.cumsum(np.random.default_rng(3).uniform(0.01, 0.2, 30)).tolist()
    path = write_clip(tmp_path / "v.mp4", 30, times=times)
    pictures, _, _ = read(path)
    assert [picture.time for picture in pictures] == pytest.approx(frame_times(path), abs=1e-9)
    assert np.ptp(np.diff([picture.time for picture in pictures])) > 0.1


def test_every_start_and_end_choose_frames_and_sound(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 100, key_every=30)
    pictures, sounds, _ = read(path, every=3, start=1.0, end=2.4)
    assert [picture.number for picture in pictures] == list(range(0, 35, 3))
    assert [picture.time for picture in pictures] == pytest.approx([1 + 0.12 * n for n in range(12)])
    assert [float(picture.offset) for picture in pictures] == pytest.approx([0.12 * n for n in range(12)])
    wanted = [data for pts, _, _, data in sound_packets(path) if 1.0 <= pts / 44100 < 2.4]
    assert [sound.data for sound in sounds] == wanted and sounds[0].pts / 44100 < 0.03


@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
def test_rotation_is_honoured(tmp_path: Path, quarter: int) -> None:
    image = np.zeros((48, 64, 3), np.uint8)
    image[:16, :16] = 255  # the corner at the upper left
    path = write_clip(tmp_path / "a.mp4", 3, image=lambda number: image, sound=None)
    turn(path, quarter)
    upright = read(path)[0][0].image
    wanted = np.rot90(image, -quarter)
    assert upright.shape == wanted.shape
    assert np.abs(upright.astype(int) - wanted).mean() < 10


def test_damaged_frames_are_left_out_and_counted(tmp_path: Path) -> None:
    for name, packet in (("a.mp4", 0), ("a.ts", 188)):
        path = write_clip(tmp_path / name, 50, options={"movflags": "faststart"} if name == "a.mp4" else None)
        flip_bytes(path, (0.4, 0.5), packet=packet)
        pictures, _, opened = read(path)
        assert opened.counts.damaged > 0, name
        assert 30 <= len(pictures) < 50 and pictures[-1].time > 1.9
        assert len(pictures) + opened.counts.damaged == opened.counts.decoded


def test_packets_that_cannot_be_decoded_count_as_frames(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.avi", 20, codec="mjpeg", pix_fmt="yuvj420p", sound=None)
    content = path.read_bytes()
    starts = [at for at in range(len(content)) if content.startswith(b"\xff\xd8\xff", at)]
    assert len(starts) == 20
    path.write_bytes(content[: starts[7]] + b"\0" * (starts[8] - starts[7] - 8) + content[starts[8] - 8 :])
    pictures, _, opened = read(path)
    assert opened.counts.damaged == 1 and [picture.number for picture in pictures] == [*range(7), *range(8, 20)]


def test_truncated_files_keep_their_frames_and_say_so(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 50, options={"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    pictures, _, opened = read(path)
    assert 10 < len(pictures) < 50
    assert opened.problem == f"breaks off after {len(pictures)} frames: the file's end is missing"
    assert not is_cut_short(write_clip(tmp_path / "b.mp4", 5))


def _without_end(path: Path) -> None:
    write_clip(path, 20)
    path.write_bytes(path.read_bytes()[:2000])


def _sound_only(path: Path) -> None:
    with av.open(str(path), "w") as output:
        voice = output.add_stream("aac", rate=44100, layout="mono")
        part = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        part.sample_rate = 44100
        output.mux(voice.encode(part))
        output.mux(voice.encode())


def _huge(path: Path) -> None:
    """Frames of 65,000 x 65,000 pixels, by the header."""
    write_clip(path.with_suffix(".avi"), 3, codec="rawvideo", sound=None)
    content = bytearray(path.with_suffix(".avi").read_bytes())
    at = content.index(b"strf") + 8
    content[at + 4 : at + 12] = struct.pack("<ii", 65000, 65000)
    path.write_bytes(content)


def _playlist(path: Path) -> None:
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_without_end, "Invalid data"),
        (_sound_only, "expected a video stream, got 'none'"),
        (_playlist, "no video, or of an unknown format"),
        (lambda path: path.write_bytes(b""), "no video, or of an unknown format"),
        (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "no video, or of an unknown format"),
        (lambda path: path.write_bytes(b"\0\0\0\x18ftypmp42" + np.random.default_rng(0).bytes(5000)), "Invalid data"),
        (lambda path: None, "No such file"),
    ],
)  # fmt: skip
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, make, reason: str) -> None:
    path = tmp_path / "x.mp4"
    make(path)
    with pytest.raises(VideoError, match=reason) as error:
        read(path)
    assert "x.mp4" in str(error.value) and "\n" not in str(error.value)


def test_frames_of_absurd_sizes_are_never_allocated(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    _huge(path)
    with at_most(512):
        try:
            pictures, _, opened = read(path)
        except VideoError as error:
            assert "expected frames of at most" in str(error)
        else:
            assert not pictures and opened.problem is not None and "no frame could be read" in opened.problem


def test_a_video_without_frames_has_a_problem(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.ts", 20, sound=None)
    flip_bytes(path, (0.0, 1.0), step=3, packet=188)
    try:
        pictures, _, opened = read(path)
    except VideoError:
        return
    assert not pictures and opened.problem is not None and "no frame could be read" in opened.problem


def test_mutated_files_raise_nothing_else(tmp_path: Path) -> None:
    make = np.random.default_rng(5)
    for name in ("a.mp4", "a.mkv", "a.avi"):
        kind = {"codec": "mpeg4"} if name == "a.avi" else {}
        content = write_clip(tmp_path / name, 12, sound=None, **kind).read_bytes()
        for _ in range(25):
            changed = bytearray(content)
            for at in make.integers(0, len(changed), int(make.integers(1, 40))):
                changed[at] = int(make.integers(256))
            path = tmp_path / f"changed_{name}"
            path.write_bytes(changed[: int(make.integers(50, len(changed)))] if make.random() < 0.3 else changed)
            try:
                pictures, _, opened = read(path)
            except VideoError:
                continue
            assert len(pictures) <= 40 and opened.counts.decoded >= len(pictures)


def test_inputs_are_told_apart(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", 2, sound=None)
    (tmp_path / "named").write_bytes((tmp_path / "clip.mp4").read_bytes())
    (tmp_path / "photo.jpg").write_bytes(b"")
    (tmp_path / "clip_panoptic.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes())
    (tmp_path / "clip.jsonl").write_text('{"frame": 0, "time": 0}\n')
    given = ["camera:1", "/dev/video0", "rtsp://me:secret@host:8554/cam/1", str(tmp_path), str(tmp_path / "named"),
             str(tmp_path / "photo.jpg"), str(tmp_path / "*.mp4"), str(tmp_path / "none.mp4")]
    videos, others = find_videos(given)
    assert [(video.kind, video.name) for video in videos] == [
        ("camera", "camera_1."), ("camera", "camera_0."), ("stream", "host_8554_cam_1."), ("file", "clip.mp4"),
        ("file", "named"), ("file", "clip.mp4")]  # fmt: skip
    assert others == [str(tmp_path), str(tmp_path / "photo.jpg"), str(tmp_path / "none.mp4")]
    assert "secret" not in videos[2].shown + videos[2].name and videos[2].is_live
    assert container_format(tmp_path / "photo.jpg") is None


def test_without_pyav_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "maskformer_fast\[video\]"'):
        VideoReader(source_of(tmp_path / "a.mp4"), VideoOptions())
