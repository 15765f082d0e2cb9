"""The demo's page: over HTTP, served by the command, and in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskformer_fast.core.results import SemanticResult
from maskformer_fast.demo.__main__ import listen, write_scenes
from maskformer_fast.demo.page import KEPT_IMAGES, OpenImages, _same_host, build_app
from maskformer_fast.demo.stages import StagedPredictor
from maskformer_fast.inference.load import load
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.modeling.weights import save_weights
from tests.support.demo_cases import Shown, expected_at, scene_predictor, tiny_predictor
from tests.support.images import photo

pytest.importorskip("gradio", reason='needs gradio: pip install -e ".[demo]"')

LOCAL = ("127.0.0.1", "localhost", "::1")
ASKED_FOR: list[str] = []
"""Hosts that this process connected to or looked up since the page was built."""
PATIENCE = 120  # seconds; a busy machine takes long to start a browser


def _note_hosts(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo":
        ASKED_FOR.append(str(arguments[0]))
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        ASKED_FOR.append(str(arguments[1][0]))


@pytest.fixture(scope="module")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "photo.png"
    Image.fromarray(photo()).save(path)
    return path


@pytest.fixture(scope="module")
def broken_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "broken.png"
    path.write_bytes(b"not an image")
    return path


# Over HTTP, served by the command


@contextmanager
def running(source: Path, folder: Path) -> Iterator[str]:
    """The address that ``python -m maskformer_fast.demo`` prints; the command has to end without a trace."""
    temporary = folder / "temporary"
    temporary.mkdir()
    line = [sys.executable, "-m", "maskformer_fast.demo", str(source), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    environment.pop("COVERAGE_PROCESS_CONFIG", None)  # which makes it two to three times slower
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    try:
        assert process.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert address, (folder / "errors").read_text()
        yield address[0]
        process.send_signal(signal.SIGTERM)  # which, unlike Ctrl-C, ends a process without a clean-up unless asked
        assert process.wait(timeout=60) == 0, (folder / "errors").read_text()
        assert not list(temporary.glob("maskformer_fast_demo_*")), "what visitors uploaded was left"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Predictor]]:
    """The command's address for a bundle, and a predictor with its weights."""
    folder = tmp_path_factory.mktemp("command")
    bundle, predictor = tiny_predictor(folder / "bundle")
    with running(bundle, folder) as address:
        yield address, predictor


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mask2former", "eomt"])
def test_the_api_segments_by_a_checkpoint_of_each_kind(kind: str, tmp_path: Path, image_file: Path) -> None:
    from gradio_client import Client, handle_file

    predictor = scene_predictor(kind)
    checkpoint = tmp_path / f"{kind}.safetensors"
    save_weights(checkpoint, predictor.network, predictor.config, predictor.metadata, 0)
    reference = load(checkpoint, "cpu")
    with running(checkpoint, tmp_path) as address:
        client = Client(address, verbose=False, analytics_enabled=False)
        page = client.predict(handle_file(image_file), "semantic", api_name="/segment")
        for task in ("semantic", "panoptic", "instance"):
            page = page if task == "semantic" else client.predict(task, api_name="/switch")
            shown, result = Shown(page), reference.predict(photo(), task)
            assert shown.task == task
            for y, x in np.ndindex(6, 6):
                category, score = expected_at(result, 10 * y, 14 * x)
                name, got = shown.at(10 * y, 14 * x)
                assert name == (None if category is None else predictor.metadata.class_names[category])
                if score is not None and got is not None:
                    assert got == pytest.approx(score, abs=0.02)


def test_the_api_segments_for_every_task_and_reports_bad_files(
    command: tuple[str, Predictor], image_file: Path, broken_file: Path
) -> None:
    from gradio_client import Client, handle_file

    address, predictor = command
    client = Client(address, verbose=False, analytics_enabled=False)
    names = predictor.metadata.class_names
    for task in ("panoptic", "semantic", "instance"):
        if task == "panoptic":
            page = client.predict(handle_file(image_file), task, api_name="/segment")
        else:
            page = client.predict(task, api_name="/switch")
        shown, result = Shown(page), predictor.predict(photo(), task)
        assert shown.task == task and len(shown.facts["segments"]) > 0
        # The network ran, and a bundle's post-processing of all tasks, for the first task.
        kept = {stage for stage, (_, is_kept) in shown.stages.items() if is_kept}
        assert kept == (set() if task == "panoptic" else {"decode", "resize", "network"})
        right = 0
        for y, x in np.ndindex(12, 12):
            category, score = expected_at(result, 5 * y, 7 * x)
            name, got = shown.at(5 * y, 7 * x)
            right += name == (None if category is None else names[category])
            if task != "semantic" and score is not None and got is not None:
                assert got == pytest.approx(score, abs=0.02)
        assert right >= 140  # of 144; onnxruntime and PyTorch differ where two classes are equally likely
    page = client.predict(handle_file(broken_file), "semantic", api_name="/segment")
    assert 'class="mf-error"' in page and "broken.png: cannot be decoded" in page
    assert str(broken_file.parent) not in page
    with pytest.raises(Exception, match="cake"):
        client.predict(handle_file(image_file), "cake", api_name="/segment")
    assert Shown(client.predict(handle_file(image_file), "instance", api_name="/segment")).task == "instance"


def test_visitors_at_the_same_time_have_their_own_images(command: tuple[str, Predictor], image_file: Path) -> None:
    from gradio_client import Client, handle_file

    address, predictor = command
    others = photo(3, 33, 70)
    Image.fromarray(others).save(image_file.with_name("other.png"))
    files = [image_file, image_file.with_name("other.png")]
    clients = [Client(address, verbose=False, analytics_enabled=False) for _ in files]
    for task in ("semantic", "panoptic"):
        if task == "semantic":
            jobs = [c.submit(handle_file(f), task, api_name="/segment") for c, f in zip(clients, files, strict=True)]
        else:
            jobs = [client.submit(task, api_name="/switch") for client in clients]
        for job, image in zip(jobs, (photo(), others), strict=True):
            shown, result = Shown(job.result(timeout=PATIENCE)), predictor.predict(image, task)  # type: ignore[arg-type]
            assert shown.task == task and shown.map.shape == image.shape
            points = [(y, x) for y in range(0, image.shape[0], 6) for x in range(0, image.shape[1], 7)]
            names = [None if (found := expected_at(result, *at)[0]) is None else predictor.metadata.class_names[found]
                     for at in points]  # fmt: skip
            right = [shown.at(*at)[0] == name for at, name in zip(points, names, strict=True)]
            assert np.mean(right) > 0.97


@pytest.mark.parametrize("url", [None, "same"])
def test_files_that_were_not_uploaded_are_refused(
    command: tuple[str, Predictor], image_file: Path, url: str | None
) -> None:
    """A request with the path of a file on this machine, in place of an upload, is refused."""
    upload = {"path": str(image_file), "url": url and str(image_file), "meta": {"_type": "gradio.FileData"}}
    call = f"{command[0]}/gradio_api/call/segment"
    request = urllib.request.Request(call, json.dumps({"data": [upload, "semantic"]}).encode())
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}", timeout=PATIENCE) as answer:
        text = answer.read().decode()
    assert "event: error" in text and "not uploaded" in text and "mf-view" not in text
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{command[0]}/gradio_api/file={image_file}", timeout=PATIENCE)


def test_other_host_names_are_refused_and_the_policy_is_sent(command: tuple[str, Predictor]) -> None:
    with urllib.request.urlopen(command[0], timeout=PATIENCE) as answer:
        page = answer.read().decode()
        policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy
    assert "mf-picture" in page  # the script is in the page itself
    with pytest.raises(urllib.error.HTTPError, match="400"):  # a name that another site pointed to this machine
        urllib.request.urlopen(urllib.request.Request(command[0], headers={"Host": "evil.example"}), timeout=PATIENCE)


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://evil.example", 403), ("null", 403), ("http://localhost:1", 403),
     ("http://{host}.evil.example", 403), ("http://{host}", 200), (None, 200)],
)
@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/queue/join", "/config"])
def test_requests_of_other_web_sites_are_refused(
    command: tuple[str, Predictor], origin: str | None, status: int, path: str
) -> None:
    host = command[0].removeprefix("http://")
    upload = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\na\r\n--x--'
    body, kind = {
        "/gradio_api/upload": (upload, "multipart/form-data; boundary=x"),
        "/gradio_api/queue/join": (b'{"data": ["semantic"], "fn_index": 3, "session_hash": "x"}', "application/json"),
        "/config": (None, "text/plain"),
    }[path]  # fmt: skip
    request = urllib.request.Request(command[0] + path, body, {"content-type": kind})
    if origin is not None:
        request.add_header("Origin", origin.format(host=host))
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            got = answer.status
    except urllib.error.HTTPError as error:
        got = error.code
    assert got == status


def test_the_ports_of_schemes_may_be_left_out_of_an_origin() -> None:
    assert _same_host("http://a.example", "a.example:80") and _same_host("https://a.example:443", "a.example:443")
    assert _same_host("https://a.example", "a.example") and _same_host("http://[::1]:7860", "[::1]:7860")
    assert not _same_host("http://a.example:x", "a.example") and not _same_host("", "")


def test_no_answer_names_a_folder_and_the_names_in_them_can_be_asked_for(
    command: tuple[str, Predictor], image_file: Path
) -> None:
    from gradio_client import Client, handle_file

    address, _ = command
    answers = [urllib.request.urlopen(address + path, timeout=PATIENCE).read().decode() for path in ("/", "/config")]
    upload = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%b\r\n--x--'
    request = urllib.request.Request(f"{address}/gradio_api/upload", upload % image_file.read_bytes(),
                                     {"content-type": "multipart/form-data; boundary=x"})
    answers.append(urllib.request.urlopen(request, timeout=PATIENCE).read().decode())
    try:
        urllib.request.urlopen(f"{address}/gradio_api/file={json.loads(answers[2])[0]}.missing", timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        answers.append(error.read().decode())
    client = Client(address, verbose=False, analytics_enabled=False)
    answers.append(client.predict(handle_file(image_file), "semantic", api_name="/segment"))
    assert len(answers) == 5
    for answer in answers:
        assert "maskformer_fast_demo_" not in answer and str(image_file.parent) not in answer
    scene = re.search(r'"path":"(/[^"]*scene_1\.png)"', answers[1])
    assert scene
    for path in (scene[1], json.loads(answers[2])[0]):
        with urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=PATIENCE) as answer:
            assert Image.open(answer).size[0] > 1


def test_a_few_images_stay_in_memory_and_the_oldest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("maskformer_fast.demo.page.DemoImage", lambda staged, path: opened.append(path) or path)
    images = OpenImages(StagedPredictor(scene_predictor()))
    for name in "abcd":
        images.open(name)
    assert images.again("a") == "a" and opened == [*"abcd"]
    images.open("e")  # b is the oldest
    for name in "acde":
        images.again(name)
    assert opened == [*"abcde"]
    images.again("b")
    assert opened == [*"abcdeb"] and len(images._kept) == KEPT_IMAGES == 4
    images.close("b")
    images.close("never opened")
    images.close(None)
    assert len(images._kept) == 3


def test_a_visitor_whose_image_was_dropped_still_sees_it_in_another_task(
    command: tuple[str, Predictor], image_file: Path
) -> None:
    from gradio_client import Client, handle_file

    address = command[0]
    client = Client(address, verbose=False, analytics_enabled=False)
    client.predict(handle_file(image_file), "semantic", api_name="/segment")
    for number in range(20):  # more visits than images or pages are kept of
        other = image_file.with_name(f"other_{number}.png")
        Image.fromarray(photo(number, 40, 50 + number)).save(other)
        Client(address, verbose=False, analytics_enabled=False).predict(
            handle_file(other), "semantic", api_name="/segment"
        )
    shown = Shown(client.predict("panoptic", api_name="/switch"))
    assert shown.task == "panoptic" and shown.map.shape == photo().shape
    assert not any(kept for _, kept in shown.stages.values()), "the network ran again"


def test_tasks_that_a_network_cannot_do_are_not_offered(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    staged = StagedPredictor(scene_predictor("per_pixel"))
    app = build_app(staged, "baseline", write_scenes(tmp_path, scene_predictor().config.data.shapes))
    offered = [part["props"] for part in TestClient(app).get("/config").json()["components"] if part["type"] == "radio"]
    assert [choice for props in offered for choice in props["choices"]] == [["Semantic", "semantic"]]


# In a browser


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, StagedPredictor, Predictor]]:
    """A page's address, its predictor, and another one with the same weights."""
    import uvicorn

    sys.addaudithook(_note_hosts)
    folder = tmp_path_factory.mktemp("served")
    _, predictor = tiny_predictor(folder / "one")
    _, reference = tiny_predictor(folder / "two")
    staged = StagedPredictor(predictor)
    scenes = write_scenes(folder, scene_predictor().config.data.shapes)
    with pytest.MonkeyPatch.context() as patched, listen("127.0.0.1", 0) as at:
        patched.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        app = build_app(staged, "the tests' network", scenes, LOCAL)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.05)
            yield f"http://127.0.0.1:{at.getsockname()[1]}", staged, reference
        finally:
            server.should_exit = True
            thread.join()


class Visitor:
    """A browser on the page."""

    def __init__(self, driver: Any) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        self.driver = driver
        self.wait = WebDriverWait(driver, PATIENCE, poll_frequency=0.1)

    def all(self, selector: str) -> list[Any]:
        elements: list[Any] = self.driver.find_elements("css selector", selector)
        return elements

    def one(self, selector: str) -> Any:
        """Wait for a visible element."""
        return self.wait.until(lambda _: [part for part in self.all(selector) if part.is_displayed()])[0]

    def upload(self, path: Path) -> None:
        self.wait.until(lambda _: self.all("#mf-file input[type=file]"))[0].send_keys(str(path))

    def choose_task(self, task: str) -> None:
        next(part for part in self.all("#mf-task input") if part.get_attribute("value") == task).click()

    def hover(self, y: float, x: float, size: tuple[int, int]) -> str:
        """Point at the middle of an image's pixel -> the text beside the pointer."""
        from selenium.webdriver.common.action_chains import ActionChains

        picture = self.one(".mf-view .mf-picture")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", picture)
        shown = picture.size
        at = (x + 0.5) / size[1] * shown["width"], (y + 0.5) / size[0] * shown["height"]
        right, down = round(at[0] - shown["width"] / 2), round(at[1] - shown["height"] / 2)
        moves = ActionChains(self.driver, duration=0).move_to_element_with_offset(picture, right - 1, down)
        moves.move_to_element_with_offset(picture, right, down).perform()  # a pointer that stays says nothing
        tip = self.one(".mf-tip")
        corner = (tip.location["x"] - picture.location["x"], tip.location["y"] - picture.location["y"])
        reach = (tip.size["width"] + 30, tip.size["height"] + 30)
        assert all(abs(a - b) < c for a, b, c in zip(corner, at, reach, strict=True)), "the text is not at the pointer"
        text: str = tip.text
        return text

    def requests(self, address: str) -> list[str]:
        """URLs that the page requested from other hosts."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        urls += [m["params"]["url"] for m in messages if m["method"] == "Network.webSocketCreated"]
        assert any(url.startswith(address) for url in urls), "no request was seen at all"
        return [url for url in urls if not url.startswith((address, "data:", "blob:", "chrome:"))]


@pytest.fixture
def visitor() -> Iterator[Visitor]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    from selenium.webdriver.chrome.service import Service

    browser, program = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or program is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                     "--window-size=1280,1600"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(program))
    try:
        yield Visitor(driver)
    finally:
        driver.quit()


def probes(result: Any, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Pixels of different segments, each with all eight neighbours in its own segment."""
    found: dict[Any, tuple[int, int]] = {}
    for y in range(2, size[0] - 2, 3):
        for x in range(2, size[1] - 2, 3):
            around = {expected_at(result, y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
            if len(around) == 1:
                found.setdefault(around.pop(), (y, x))
    return list(found.values())


def test_a_visit_in_a_browser(
    served: tuple[str, StagedPredictor, Predictor], visitor: Visitor, image_file: Path, broken_file: Path
) -> None:
    """Upload, hover, switch, break, choose a scene; nothing fails in the browser, and no other host is asked."""
    address, staged, reference = served
    size = photo().shape[:2]
    names = reference.metadata.class_names
    runs: list[int] = []
    staged.predictor.network.register_forward_hook(lambda *_: runs.append(1))  # type: ignore[union-attr]
    visitor.driver.get(address)
    visitor.one(".mf-view[data-task=semantic]")  # a scene, without any file at hand
    ratio = visitor.all(".mf-view .mf-stage")[0].get_attribute("style")
    visitor.upload(image_file)
    visitor.wait.until(lambda _: [s for s in visitor.all(".mf-stage") if s.get_attribute("style") != ratio])
    assert len(runs) == 2
    for width, task in ((1280, "semantic"), (1280, "instance"), (700, "panoptic"), (460, "semantic")):
        visitor.driver.set_window_size(width, 1600)  # the picture is scaled to what room there is
        visitor.choose_task(task)
        visitor.one(f".mf-view[data-task={task}]")
        result = reference.predict(photo(), task)  # type: ignore[arg-type]
        if isinstance(result, SemanticResult):
            opened = StagedPredictor(reference).open(photo())
            opened.result("semantic")
            scores = opened.pixel_scores()
        pixels = probes(result, size)
        assert len(pixels) > 1, "a picture with one segment does not test the map"
        for y, x in pixels[:4]:
            category, score = expected_at(result, y, x)
            text = visitor.hover(y, x, size)
            if category is None:
                assert text == {"instance": "no instance", "panoptic": "no segment"}[task]
                continue
            if isinstance(result, SemanticResult):
                assert scores is not None
                score = float(scores[y, x])
            kind = "thing" if reference.metadata.is_thing[category] else "stuff"
            said = re.fullmatch(r"(.*) score (\d+\.\d\d) · (\w+)", text)
            assert said and (said[1], said[3]) == (names[category], kind), text
            assert float(said[2]) == pytest.approx(score, abs=0.03)
        assert visitor.driver.execute_script("return document.querySelector('.mf-shade').width") == size[1]
        stages = {row.get_attribute("data-stage"): row.text for row in visitor.all(".mf-times tr[data-stage]")}
        wanted = ["decode", "resize", "network", "post-processing", "drawing"]
        assert [stage for stage in stages if stage != "scores to hover"] == wanted
        assert all(re.search(r"\d+\.\d$", text) for text in stages.values()), stages
    # Elements are kept from one result to the next where they are alike, and another task can have the same map.
    rename = "const s = document.querySelector('.mf-stage'), f = JSON.parse(s.dataset.facts);"
    rename += "f.segments.forEach((segment) => (segment.name = 'renamed')); s.dataset.facts = JSON.stringify(f);"
    visitor.driver.execute_script(rename)
    assert visitor.hover(*pixels[0], size).startswith("renamed score ")
    assert len(runs) == 2, "the network ran again for another task"
    assert len(visitor.all("tr[data-row]")) == len(np.unique(reference.predict(photo()).labels))
    visitor.driver.execute_script("document.documentElement.dispatchEvent(new PointerEvent('pointerleave'))")
    assert not visitor.all(".mf-tip")[0].is_displayed()
    visitor.driver.set_window_size(1280, 1600)
    visitor.one("#mf-file button[aria-label=Clear], #mf-file button[aria-label=Remove]").click()
    visitor.one(".mf-empty")
    visitor.upload(broken_file)
    assert visitor.one(".mf-error").text == "broken.png: cannot be decoded: cannot identify image file 'broken.png'"
    visitor.all("#mf-scenes button")[2].click()
    visitor.one(".mf-view[data-task=semantic]")
    assert [entry for entry in visitor.driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert visitor.requests(address) == []
    assert set(ASKED_FOR) <= {*LOCAL, "None"}, ASKED_FOR
