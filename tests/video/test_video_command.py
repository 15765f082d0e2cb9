"""Videos of `predict`: files that are written, overlays with sound, streams that break, signals, memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskformer_fast import predict
from maskformer_fast.config import TestConfig
from maskformer_fast.video import reader, segment_video
from maskformer_fast.video.channel import Channel, Closed
from maskformer_fast.video.command import predict_videos
from maskformer_fast.video.options import VideoOptions
from maskformer_fast.video.pipeline import Pipeline
from maskformer_fast.video.reader import VideoReader
from maskformer_fast.video.sources import Source, source_of
from maskformer_fast.video.tracker import track
from tests.docs.world import untrained_run
from tests.support.clips import flip_bytes, frame_times, sound_packets, write_clip
from tests.support.moving_scene import MovingScene
from tests.support.paths import ROOT
from tests.support.tiny_bundle import tiny_bundle
from tests.support.video_stub import ByColor

av = pytest.importorskip("av")
TASKS = ("semantic", "panoptic", "instance")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(folder: Path, *videos: Path | str | Source, tasks: Any = TASKS, stub: Any = None, **options: Any) -> list[str]:
    sources = [video if isinstance(video, Source) else source_of(video) for video in videos]
    return predict_videos(stub or ByColor(3), sources, tasks, VideoOptions(**options), folder)


def test_lines_have_times_classes_masks_and_tracks(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 30)
    assert run(tmp_path / "out", path, min_score=0.0) == []
    found = lines(tmp_path / "out" / "a.jsonl")
    assert [line["frame"] for line in found] == list(range(30))
    assert [line["time"] for line in found] == pytest.approx(frame_times(path))
    mask_tools = pytest.importorskip("pycocotools.mask")
    with av.open(str(path)) as source:
        images = [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]
    panoptic = [ByColor().result(image, "panoptic") for image in images]
    ids = track(panoptic)
    for number in (0, 17, 29):
        line, labels = found[number], ByColor().result(images[number], "semantic").labels.numpy()
        assert line["size"] == [48, 64]
        for task in TASKS:
            for entry in line[task]:
                mask = mask_tools.decode(entry["segmentation"]).astype(bool)
                assert (mask == (labels == entry["category_id"] - 1)).all() and entry["area"] == mask.sum() > 0
                assert ("score" in entry) == ("track_id" in entry) == (task != "semantic")
        assert len(line["semantic"]) == len(line["panoptic"]) == len(np.unique(labels))
        assert [entry["track_id"] for entry in line["panoptic"]] == ids[number]
        assert [entry["score"] for entry in line["panoptic"]] == [0.75] * len(line["panoptic"])


def test_instances_below_the_score_are_left_out(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 60, sound=None)
    run(tmp_path / "all", path, tasks=("instance",), min_score=0.0)
    run(tmp_path / "some", path, tasks=("instance",))
    every, some = (lines(tmp_path / name / "a.jsonl") for name in ("all", "some"))
    scores = [entry["score"] for line in some for entry in line["instance"]]
    assert min(scores) >= 0.5 and len(scores) < sum(len(line["instance"]) for line in every)


@pytest.mark.parametrize("name", ["a.mp4", "v.mp4", "a.mkv"])
def test_overlays_keep_times_and_the_sound_packet_by_packet(tmp_path: Path, name: str) -> None:
    times = np.cumsum(np.random.default_rng(3).uniform(0.01, 0.2, 40)).tolist() if name == "v.mp4" else None
    path = write_clip(tmp_path / name, 40, times=times)
    assert run(tmp_path / "out", path, tasks=("semantic", "panoptic")) == []
    for task in ("semantic", "panoptic"):
        overlay = tmp_path / "out" / f"{path.stem}_{task}.mp4"
        assert frame_times(overlay) == pytest.approx(frame_times(path), abs=1e-4)
        ours, theirs = sound_packets(overlay), sound_packets(path)
        assert [packet[3] for packet in ours] == [packet[3] for packet in theirs] and len(ours) > 50
        if name != "a.mkv":  # whose packets have times in milliseconds
            assert ours == theirs
    with av.open(str(overlay)) as result, av.open(str(path)) as source:
        assert result.streams.video[0].time_base == source.streams.video[0].time_base or name == "a.mkv"
        first = next(result.decode(video=0)).to_ndarray(format="rgb24")
    assert first.shape == (240, 320, 3)  # tiny pictures are enlarged
    assert np.abs(first.astype(int) - 255).sum(-1).min() < 60, "white outlines are drawn"


def test_sound_of_a_transport_stream_and_odd_sides(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.ts", 30, (46, 330))
    run(tmp_path / "out", path, tasks=("semantic",), every=2, start=0.4)
    overlay = tmp_path / "out" / "a_semantic.mp4"
    times = frame_times(overlay)
    assert len(times) == 10 and np.diff(times) == pytest.approx(0.08, abs=1e-3) and times[0] < 0.08
    with av.open(str(overlay)) as result:
        sound = sum(frame.samples for frame in result.decode(audio=0)) / 44100
    assert sound == pytest.approx(0.8, abs=0.1)


def test_sound_that_mp4_cannot_have_is_left_out_with_a_warning(tmp_path: Path, caplog: Any) -> None:
    path = write_clip(tmp_path / "a.avi", 10, sound="wmav2", codec="mpeg4")
    assert run(tmp_path / "out", path, tasks=("semantic",)) == []
    with av.open(str(tmp_path / "out" / "a_semantic.mp4")) as result:
        assert not result.streams.audio and len(list(result.decode(video=0))) == 10
    assert "sound of wmav2 is left out" in caplog.text


def test_a_frame_whose_inference_fails_is_reported_and_costs_no_other(tmp_path: Path, capsys: Any) -> None:
    class Poisoned(ByColor):
        def infer(self, images: Any, tasks: Any) -> Any:
            if any(np.array_equal(image, poison) for image in images):
                raise RuntimeError("not enough memory")
            return super().infer(images, tasks)

    path = write_clip(tmp_path / "a.mp4", 10, image=lambda number: np.full((48, 64, 3), 25 * number, np.uint8))
    with av.open(str(path)) as source:
        poison = [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)][4]
    assert run(tmp_path, path, stub=Poisoned(4)) == [f"{path}: 1 frames could not be segmented"]
    found = lines(tmp_path / "a.jsonl")
    assert [("error" in line) for line in found] == [number == 4 for number in range(10)]
    assert len(frame_times(tmp_path / "a_panoptic.mp4")) == 10


def test_damaged_and_bad_videos_are_reported_and_others_go_on(tmp_path: Path, capsys: Any) -> None:
    damaged = write_clip(tmp_path / "damaged.ts", 50)
    flip_bytes(damaged, (0.4, 0.5), packet=188)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    good = write_clip(tmp_path / "good.mp4", 5, sound=None)
    out = tmp_path / "out"
    problems = run(out, tmp_path / "bad.mp4", damaged, good, tasks=("panoptic",))
    assert problems == [f"{tmp_path / 'bad.mp4'}: no video, or of an unknown format"]
    told = capsys.readouterr().out
    assert "damaged frames left out" in told and "good.mp4: 5 frames segmented" in told
    assert sorted(path.name for path in out.iterdir()) == [
        "damaged.jsonl", "damaged_panoptic.mp4", "good.jsonl", "good_panoptic.mp4"]  # fmt: skip
    assert len(frame_times(out / "damaged_panoptic.mp4")) == len(lines(out / "damaged.jsonl")) > 30


def test_nothing_is_left_of_an_end_before_the_first_frame_and_other_files_stay(tmp_path: Path) -> None:
    path, out = write_clip(tmp_path / "a.mp4", 5, sound=None), tmp_path / "out"
    assert "no frame between start and end" in run(out, path, start=9.0)[0]
    assert not list(out.iterdir())
    (out / "a_panoptic.mp4").write_bytes(b"mine")
    with pytest.raises(ValueError, match="output: expected a folder without other files"):
        run(out, path)
    assert (out / "a_panoptic.mp4").read_bytes() == b"mine"


def test_the_command_takes_videos_beside_images(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    untrained_run(tmp_path / "run")
    Image.fromarray(MovingScene(0, 60).image(0)).save("photo.png")
    write_clip("clip.mp4", 6)
    arguments = ["run", "photo.png", "clip.mp4", "-o", "out", "--task", "panoptic", "--test.short-edge", "48"]
    assert predict.main([*arguments, "--video.every", "2", "--test.batch-size", "2"]) == 0
    told = capsys.readouterr()
    assert "1 images segmented" in told.out and "clip.mp4: 3 frames segmented" in told.out and "frame/s" in told.err
    assert Path("out/panoptic/photo.png").exists() and Path("out/clip_panoptic.mp4").exists()
    assert [line["frame"] for line in lines(Path("out/clip.jsonl"))] == [0, 2, 4]
    Path("clip.mp4").write_bytes(b"")
    assert predict.main(arguments) == 1


def test_a_bundle_gives_the_results_of_its_images(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from maskformer_fast.inference.bundle_predictor import load_bundle

    test = TestConfig(short_edge=64, max_size=128, object_mask_threshold=0.1, overlap_threshold=0.1)
    tiny_bundle(tmp_path / "bundle", test)
    predictor = load_bundle(tmp_path / "bundle", "cpu", backend="onnxruntime")
    path = write_clip(tmp_path / "a.mp4", 9, sound=None)
    frames = list(segment_video(predictor, path, ("panoptic", "instance"), VideoOptions(min_score=0.0)))
    assert [frame.index for frame in frames] == list(range(9))
    for frame in (frames[0], frames[8]):
        alone = predictor.predict(frame.image, "panoptic")
        assert (alone.id_map == frame.results["panoptic"].id_map).all()
        assert len(frame.tracks["panoptic"]) == len(alone.segments)
        assert len(frame.tracks["instance"]) == len(frame.results["instance"].labels) > 0


def test_frames_are_decoded_while_others_are_segmented_in_bounded_numbers(tmp_path: Path) -> None:
    path, stub = write_clip(tmp_path / "a.mp4", 60, sound=None), ByColor(4)
    opened = VideoReader(source_of(path), VideoOptions())
    with Pipeline(stub, opened, ("panoptic",)) as items:
        stream = iter(items)
        next(stream)
        deadline = time.monotonic() + 30
        while len(stub.batches) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        ahead = opened.counts.decoded
    assert 8 <= sum(stub.batches) <= 20 and ahead <= 20 + 4 * 4 + 16 + 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("video-")]


def test_a_live_source_drops_old_frames() -> None:
    channel: Channel[int] = Channel(3)
    dropped = [channel.put_newest(number, lambda old: old % 2 == 0) for number in (1, 2, 3, 4, 5)]
    assert dropped == [False, False, False, True, True]
    channel.end()
    assert [channel.get(), channel.get(), channel.get()] == [1, 3, 5] and channel.is_empty()
    with pytest.raises(Closed):
        channel.get()
    with pytest.raises(Closed):
        channel.put(6)


class Broadcast:
    """A server of a transport stream that closes each connection in the middle, and refuses the one after it."""

    def __init__(self, content: bytes, shares: list[float]) -> None:
        asked: list[float | None] = [part for share in shares for part in (share, None)]

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                share = asked.pop(0) if asked else None
                if share is None:
                    self.send_error(503)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "video/mp2t")
                self.end_headers()
                self.wfile.write(content[: int(len(content) * share) // 188 * 188])

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}/live.ts"

    def __enter__(self) -> Broadcast:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_a_stream_that_breaks_is_taken_up_again(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(reader, "FIRST_WAIT", 0.01)
    content = write_clip(tmp_path / "a.ts", 50).read_bytes()
    with Broadcast(content, [0.5, 0.8, 1.0]) as server:
        problems = run(tmp_path / "out", server.address, tasks=("panoptic",), retries=3)
    assert len(problems) == 1 and "did not come back in 3 attempts" in problems[0]
    assert "2 breaks taken up again" in capsys.readouterr().out
    [path] = (tmp_path / "out").glob("*.jsonl")
    found = lines(path)
    times = [line["time"] for line in found]
    assert 100 <= len(found) <= 118 and times[0] == 0
    assert np.diff(times) == pytest.approx(0.04, abs=0.02), "time goes on where the server begins anew"
    assert [line["frame"] for line in found] == list(range(len(found)))
    assert len(frame_times(path.with_name(f"{path.stem}_panoptic.mp4"))) == len(found)


def test_a_stream_is_not_waited_for_without_retries(tmp_path: Path) -> None:
    content = write_clip(tmp_path / "a.ts", 50, sound=None).read_bytes()
    with Broadcast(content, [0.5]) as server:
        problems = run(tmp_path / "out", server.address, tasks=("panoptic",), retries=0)
    assert "did not come back in 0 attempts" in problems[0]
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_complete_files(tmp_path: Path, number: signal.Signals) -> None:
    class Stopping(ByColor):
        def infer(self, images: Any, tasks: Any) -> Any:
            if len(self.batches) == 8:
                os.kill(os.getpid(), number)
            return super().infer(images, tasks)

    path = write_clip(tmp_path / "a.mp4", 200)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", path, path, tasks=("panoptic",), stub=Stopping())
    assert signal.getsignal(number) is before
    done = lines(tmp_path / "out" / "a.jsonl")
    assert 0 < len(done) < 100
    assert len(frame_times(tmp_path / "out" / "a_panoptic.mp4")) == len(done)
    assert len(list((tmp_path / "out").iterdir())) == 2, "no temporary file, no second video"


def test_a_signal_ends_the_wait_for_a_stream_that_is_silent(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(reader, "OPEN_SECONDS", 3.0)
    content = write_clip(tmp_path / "a.ts", 50).read_bytes()
    silent = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()
            silent.wait(60)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stub = ByColor()

    def interrupt() -> None:
        while len(stub.batches) < 20:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", f"http://127.0.0.1:{server.server_address[1]}/a.ts", tasks=("panoptic",), stub=stub)
    finally:
        silent.set()
        server.shutdown()
        server.server_close()
    [path] = (tmp_path / "out").glob("*.jsonl")
    assert 0 < len(lines(path)) <= 50


def test_a_killed_process_leaves_no_file_of_a_result_name(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 60)

    class Failing(ByColor):
        def result(self, image: Any, task: Any) -> Any:
            raise SystemExit(3)

    with pytest.raises(SystemExit):
        run(tmp_path / "out", path, stub=Failing())
    assert not list((tmp_path / "out").iterdir())


HOUR = """
import sys
import numpy as np
from maskformer_fast.core.machine import peak_resident_bytes, reset_peak_resident_bytes
from maskformer_fast.video.command import predict_videos
from maskformer_fast.video.options import VideoOptions
from maskformer_fast.video.sources import source_of
from pathlib import Path
from tests.support.video_stub import ByColor
short, long, out, every = sys.argv[1:]
peaks = []
for name in (short, long):
    reset_peak_resident_bytes()
    assert predict_videos(ByColor(4), [source_of(name)], ("panoptic",), VideoOptions(every=int(every)), Path(out)) == []
    peaks.append(peak_resident_bytes() >> 20)
print("PEAKS", *peaks)
"""


@pytest.mark.slow
@pytest.mark.no_cover
def test_an_hour_takes_the_memory_of_a_minute(tmp_path: Path) -> None:
    """90,000 frames with sound are decoded; every 50th is segmented, drawn and encoded."""
    scene = MovingScene(1, 250, (48, 64), 4)
    images = [scene.image(number) for number in range(250)]
    for name, frames in (("short.mp4", 1500), ("long.mp4", 90_000)):
        write_clip(tmp_path / name, frames, image=lambda number: images[number % 250], codec="mpeg4",
                   options={"movflags": "frag_keyframe+delay_moov"})  # fmt: skip
    arguments = [str(tmp_path / name) for name in ("short.mp4", "long.mp4", "out")]
    result = subprocess.run([sys.executable, "-c", HOUR, *arguments, "50"], cwd=ROOT, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    short, long = map(int, result.stdout.split("PEAKS")[1].split())
    print(f"peak of a minute: {short} MiB, of an hour: {long} MiB")
    assert len(lines(tmp_path / "out" / "long.jsonl")) == 1800
    assert frame_times(tmp_path / "out" / "long_panoptic.mp4")[-1] == pytest.approx(3598, abs=0.1)
    assert [packet[3] for packet in sound_packets(tmp_path / "out" / "long_panoptic.mp4")] == [
        packet[3] for packet in sound_packets(tmp_path / "long.mp4")]
    assert long < short + 48
