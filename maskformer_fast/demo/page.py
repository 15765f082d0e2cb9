"""The demo's page: an uploaded image and its results as HTML (`DemoImage`), and the gradio page (`build_app`)."""

from __future__ import annotations

import html
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from maskformer_fast.config import Task
from maskformer_fast.core.image_files import IMAGE_SUFFIXES
from maskformer_fast.core.image_resize import MAX_PIXELS
from maskformer_fast.data import BrokenExampleError
from maskformer_fast.data.images import read_image
from maskformer_fast.demo.stages import StagedPredictor
from maskformer_fast.demo.view import error_html, make_view, result_html, times_html, view_html

__all__ = ["MAX_EDGE", "DemoImage", "build_app", "import_gradio"]

MAX_EDGE = 1280
"""Longest edge of an image in pixels; larger images are first reduced to it, as a screen shows no more."""
KEPT_IMAGES = 4
"""Number of opened images that stay in memory, of all visitors together; one takes up to 50 MiB."""
KEPT_PAGES = 16
"""Number of visits of which gradio keeps the last page, of up to 8 MiB; nothing reads it."""
MAX_WAITING = 32
"""Number of requests that wait for the network; further ones are refused."""
KEPT_VISITS = 1000
"""Number of visits whose choice of an image is remembered."""
MAX_FILE_BYTES = 3 * MAX_PIXELS + 2**20
"""Largest upload in bytes: the largest image that is decoded, uncompressed."""
EMPTY = '<div class="mf-empty"><div>Drop an image on the left, or take one of the scenes below it.</div></div>'
FOLDER = Path(__file__).parent
SHARED_STAGES = ("decode", "reduce", "resize", "network", "backbone", "pixel decoder", "decoders",
                 "transformer decoder", "classifier")  # fmt: skip
"""Stages that serve all tasks of an image."""
# The content security policy: a browser fetches from no other host, whatever the page's libraries name.
_POLICY = (
    b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    b"form-action 'self'; frame-ancestors 'self'"
)


def import_gradio() -> Any:
    """gradio, with telemetry off. Raises ``ModuleNotFoundError`` with the command that installs it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which reads it
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the page needs gradio, which is not installed; install it with: pip install -e ".[demo]"', name=error.name
        ) from error
    return gradio


class DemoImage:
    """An image that a visitor opened. It is decoded once, runs through the network once, and is drawn once a task."""

    def __init__(self, staged: StagedPredictor, path: str | Path) -> None:
        """Decode a file.

        Raises:
            ValueError: it cannot be read as an image or is too large. The message names the file without its folder,
                which visitors must not learn.
        """
        start = perf_counter()
        try:
            image = read_image(path)
        except BrokenExampleError as error:
            raise ValueError(f"{Path(path).name}: {error.reason}".replace(str(path), Path(path).name)) from error
        self.seconds = {"decode": perf_counter() - start}
        self._decoded_size = image.shape[:2]
        if max(image.shape[:2]) > MAX_EDGE:
            start = perf_counter()
            image = _reduced(image)
            self.seconds["reduce"] = perf_counter() - start
        self.image = image
        self._staged = staged
        self._opened = staged.open(image)
        self._shown: dict[Task, str] = {}

    def show(self, task: Task) -> str:
        """HTML of a task's result with the stages' times. Errors are those of `StagedImage.result`."""
        if task not in self._shown:
            is_first = not self._opened.seconds
            result, postprocessing = self._opened.result(task)
            seconds = {**self.seconds, **self._opened.seconds, "post-processing": postprocessing}
            if task == "semantic":
                start = perf_counter()
                scores = self._opened.pixel_scores()
                if scores is not None:
                    seconds["scores to hover"] = perf_counter() - start
            else:
                scores = None
            start = perf_counter()
            stage, legend = view_html(make_view(self.image, result, self._staged.metadata, scores))
            seconds["drawing"] = perf_counter() - start
            kept = [] if is_first else [stage for stage in seconds if stage in SHARED_STAGES]
            self._shown[task] = result_html(task, stage, legend, times_html(seconds, kept, self._note(bool(kept))))
        return self._shown[task]

    def _note(self, some_kept: bool) -> str:
        """Line of text below the times."""
        (height, width), (shown_height, shown_width) = self._decoded_size, self.image.shape[:2]
        parts = [f"{width} × {height} pixels"]
        if (height, width) != (shown_height, shown_width):
            parts.append(f"reduced to {shown_width} × {shown_height}")
        if some_kept:
            parts.append("grey stages ran for the first task and are kept")
        return ", ".join(parts)


class OpenImages:
    """Opened images of all visitors by their files, the `KEPT_IMAGES` that were used last."""

    def __init__(self, staged: StagedPredictor) -> None:
        self._staged = staged
        self._kept: OrderedDict[str, DemoImage] = OrderedDict()

    def open(self, path: str) -> DemoImage:
        """Decode a file and keep it in the place of the image that was used longest ago. Errors are `DemoImage`'s."""
        self._kept.pop(path, None)
        while len(self._kept) >= KEPT_IMAGES:
            self._kept.popitem(last=False)
        self._kept[path] = DemoImage(self._staged, path)
        return self._kept[path]

    def again(self, path: str) -> DemoImage:
        """An image that was opened before, decoded once more if it was dropped. Errors are `DemoImage`'s."""
        if path not in self._kept:
            return self.open(path)
        self._kept.move_to_end(path)
        return self._kept[path]

    def close(self, path: str | None) -> None:
        """Drop an image, if it is kept."""
        if path is not None:
            self._kept.pop(path, None)


def _reduced(image: np.ndarray) -> np.ndarray:
    """The image with its longer edge reduced to `MAX_EDGE`."""
    height, width = image.shape[:2]
    scale = MAX_EDGE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def build_app(staged: StagedPredictor, title: str, scenes: Sequence[Path], hosts: Sequence[str] = ()) -> Any:
    """The page as an ASGI application.

    Args:
        title: name of the network on the page, for example the checkpoint's path.
        scenes: image files to choose from on the page.
        hosts: values of the Host header that are answered; none: any.

    Raises:
        ModuleNotFoundError: gradio is not installed.
    """
    gr = import_gradio()
    import fastapi
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # Against DNS rebinding: a script of another site may point its own host name to this machine.
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_middleware(_WithPolicy)
    app.add_middleware(_HidesFolder, folder=os.environ.get("GRADIO_TEMP_DIR", ""))
    app.add_middleware(_OfThisSite)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.mount_gradio_app(
        app,
        _build_page(gr, staged, title, scenes),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=MAX_FILE_BYTES,
        theme=gr.themes.Default(primary_hue="blue", **fonts),
        css=(FOLDER / "page.css").read_text(),
        head=f"<script>{(FOLDER / 'page.js').read_text()}</script>",
    )


def _build_page(gr: Any, staged: StagedPredictor, title: str, scenes: Sequence[Path]) -> Any:
    first = staged.tasks[0]

    images = OpenImages(staged)
    chosen: OrderedDict[str, str] = OrderedDict()  # file of each visit

    def attempt(open_image: Callable[[str], DemoImage], path: str, task: Task, visit: str | None) -> str:
        chosen.pop(visit or "", None)
        try:
            shown = open_image(path).show(task)
        except (ValueError, OSError, MemoryError) as error:  # errors that an image can cause
            images.close(path)
            return error_html((str(error) or type(error).__name__).replace(path, Path(path).name))
        if visit is not None:
            chosen[visit] = path
            while len(chosen) > KEPT_VISITS:
                chosen.popitem(last=False)
        return shown

    def load(task: Task, request: Any) -> str:
        return attempt(images.again, str(scenes[0]), task, request.session_hash)

    def segment(path: str | None, task: Task, request: Any) -> str:
        return EMPTY if path is None else attempt(images.open, path, task, request.session_hash)

    def switch(task: Task, request: Any) -> Any:
        path = chosen.get(request.session_hash)
        return gr.skip() if path is None else attempt(images.again, path, task, request.session_hash)

    def choose(task: Task, event: Any, request: Any) -> tuple[None, str]:
        return None, attempt(images.again, str(scenes[event.index]), task, request.session_hash)

    def clear(request: Any) -> str:
        images.close(chosen.pop(request.session_hash, None))
        return EMPTY

    # gradio passes event and request to arguments with these annotations, which need the imported library.
    for function in (load, segment, switch, choose, clear):
        function.__annotations__["request"] = gr.Request
    choose.__annotations__["event"] = gr.SelectData

    classes = staged.metadata.num_classes
    names = ", ".join(staged.metadata.class_names[:12]) + (", …" if classes > 12 else "")
    with gr.Blocks(title="maskformer_fast", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(
            f'<div class="mf-head"><h1>maskformer_fast</h1><p>{html.escape(title)} on {html.escape(staged.runs_on)}, '
            f'{classes} classes: {html.escape(names)}</p></div>'
        )  # fmt: skip
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                file = gr.File(label="your image", file_types=list(IMAGE_SUFFIXES), height=140, elem_id="mf-file")
                task = gr.Radio(
                    [(name.capitalize(), name) for name in staged.tasks], value=first, label="task", elem_id="mf-task"
                )
                gallery = gr.Gallery(
                    [str(scene) for scene in scenes], label="synthetic scenes", columns=4, height="auto",
                    object_fit="cover", allow_preview=False, interactive=False, buttons=[], format="png",
                    elem_id="mf-scenes",
                )  # fmt: skip
            with gr.Column(scale=7, min_width=320):
                view = gr.HTML(EMPTY, elem_id="mf-result")
        # One queue for all events that compute, so that one image is worked on at a time.
        queue = {"concurrency_limit": 1, "concurrency_id": "network", "show_progress": "minimal"}
        page.load(load, [task], view, api_visibility="private", **queue)
        file.upload(segment, [file, task], view, api_name="segment", **queue)
        file.clear(clear, None, view, api_visibility="private", **queue)
        task.change(switch, [task], view, api_name="switch", **queue)
        gallery.select(choose, [task], [file, view], api_visibility="private", **queue)
    # gradio sets this when it serves a page itself; without it, a request may name any file of the machine as an upload
    page.has_launched = True
    page.state_session_capacity = KEPT_PAGES
    page.queue(max_size=MAX_WAITING)
    page._queue.pending_messages_per_session.max_size = MAX_WAITING + KEPT_PAGES  # answers that nobody fetches
    return page


class _WithPolicy:
    """Adds `_POLICY` to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Any, send: Callable[[Any], Awaitable[None]]
    ) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)


class _OfThisSite:
    """Refuses requests that a script or form of another web site makes: its ``Origin`` is not the page's ``Host``."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Any, send: Callable[[Any], Awaitable[None]]
    ) -> None:
        headers = dict(scope.get("headers", ()))
        origin, host = (headers.get(name, b"").decode("latin-1") for name in (b"origin", b"host"))
        if not origin or _same_host(origin, host):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            plain = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 403, "headers": plain})
            await send({"type": "http.response.body", "body": b"requests of other web sites are refused\n"})


class _HidesFolder:
    """Replaces the path of the folder of uploads, which gradio's answers have, by a name, and back in requests.

    The name is as long as the path, so that no length in a header changes.
    """

    def __init__(self, app: Any, folder: str) -> None:
        self.app = app
        self.folder = folder.encode()
        self.name = b"/" + b"uploads".ljust(len(self.folder) - 1, b"_")

    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Any, send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http" or len(self.name) != len(self.folder):
            await self.app(scope, receive, send)
            return
        # Answers must come uncompressed.
        headers = [(key, value) for key, value in scope["headers"] if key != b"accept-encoding"]
        is_json = any(key == b"content-type" and b"json" in value for key, value in headers)
        path = scope["path"].replace(self.name.decode(), self.folder.decode())
        is_text = False

        async def receive_with_folder() -> Any:
            message = await receive()
            if is_json and message.get("body"):
                message = {**message, "body": message["body"].replace(self.name, self.folder)}
            return message

        async def send_without_folder(message: Any) -> None:
            nonlocal is_text
            if message["type"] == "http.response.start":
                kinds = [value for key, value in message.get("headers", ()) if key == b"content-type"]
                is_text = any(part in kind for kind in kinds for part in (b"json", b"html", b"event-stream"))
            elif is_text and message.get("body"):
                message = {**message, "body": message["body"].replace(self.folder, self.name)}
            await send(message)

        raw_path = scope.get("raw_path", b"").replace(self.name, self.folder)
        await self.app({**scope, "headers": headers, "path": path, "raw_path": raw_path},
                       receive_with_folder, send_without_folder)


def _same_host(origin: str, host: str) -> bool:
    """Whether an Origin header names the host and port of a Host header, in which the scheme's port may be left out."""
    try:
        from_page, asked = urlsplit(origin), urlsplit(f"//{host}")
        port = {"http": 80, "https": 443}.get(from_page.scheme)
        return port is not None and (from_page.hostname, from_page.port or port) == (asked.hostname, asked.port or port)
    except ValueError:  # a port that is no number
        return False
