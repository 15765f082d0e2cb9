"""The demo's page: an uploaded image and its results as HTML (`DemoImage`), and the gradio page (`build_app`)."""

from __future__ import annotations

import html
import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from maskformer_fast.config import Task
from maskformer_fast.core.image_files import IMAGE_SUFFIXES
from maskformer_fast.data import BrokenExampleError
from maskformer_fast.data.images import MAX_PIXELS, read_image
from maskformer_fast.demo.stages import StagedPredictor
from maskformer_fast.demo.view import error_html, make_view, result_html, times_html, view_html

__all__ = ["MAX_EDGE", "DemoImage", "build_app", "import_gradio"]

MAX_EDGE = 1280
"""Longest edge of an image in pixels; larger images are first reduced to it, as a screen shows no more."""
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

    def attempt(work: Callable[[], tuple[DemoImage, str]]) -> tuple[DemoImage | None, str]:
        try:
            return work()
        except (ValueError, OSError, MemoryError) as error:  # errors that an image can cause
            return None, error_html(str(error) or type(error).__name__)

    def open_path(path: str | Path, task: Task) -> tuple[DemoImage | None, str]:
        def work() -> tuple[DemoImage, str]:
            image = DemoImage(staged, path)
            return image, image.show(task)

        return attempt(work)

    def segment(path: str | None, task: Task) -> tuple[DemoImage | None, str]:
        return (None, EMPTY) if path is None else open_path(path, task)

    def switch(image: DemoImage | None, task: Task) -> Any:
        return (None, gr.skip()) if image is None else attempt(lambda: (image, image.show(task)))

    def choose(task: Task, event: Any) -> Any:
        return (None, *open_path(scenes[event.index], task))

    # gradio passes the event to an argument with this annotation, which needs the imported library.
    choose.__annotations__["event"] = gr.SelectData

    classes = staged.metadata.num_classes
    names = ", ".join(staged.metadata.class_names[:12]) + (", …" if classes > 12 else "")
    with gr.Blocks(title="maskformer_fast", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(
            f'<div class="mf-head"><h1>maskformer_fast</h1><p>{html.escape(title)} on {html.escape(staged.runs_on)}, '
            f'{classes} classes: {html.escape(names)}</p></div>'
        )  # fmt: skip
        opened = gr.State(time_to_live=3600)
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
        outputs = [opened, view]
        # One queue for all events that compute, so that one image is worked on at a time.
        queue = {"concurrency_limit": 1, "concurrency_id": "network", "show_progress": "minimal"}
        page.load(lambda task: open_path(scenes[0], task), [task], outputs, api_visibility="private", **queue)
        file.upload(segment, [file, task], outputs, api_name="segment", **queue)
        file.clear(lambda: (None, EMPTY), None, outputs, api_visibility="private")
        task.change(switch, [opened, task], outputs, api_name="switch", **queue)
        gallery.select(choose, [task], [file, *outputs], api_visibility="private", **queue)
    # gradio sets this when it serves a page itself; without it, a request may name any file of the machine as an upload
    page.has_launched = True
    return page.queue(max_size=32)


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
