"""The report of `inspect_data` as a page of HTML that needs no other file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #1c1c1c }
table { border-collapse: collapse; margin: 1em 0 }
td, th { border: 1px solid #ccc; padding: .25em .6em; text-align: right }
td:first-child, th:first-child { text-align: left } pre { background: #f4f4f4; padding: .8em; white-space: pre-wrap }
figure { display: inline-block; margin: .4em; max-width: 24em; vertical-align: top } figure img { width: 100% }
figcaption { overflow-wrap: anywhere; font-size: 13px } li { overflow-wrap: anywhere }
"""


def inspection_page(
    report: Mapping[str, Any],
    pictures: Sequence[tuple[str, np.ndarray]],  # name and uint8 [H, W, 3]
) -> str:
    """HTML of a report; every text of a file is escaped, and no address is loaded.

    Args:
        report: ``folder``, ``format``, ``task``, ``recipe``, ``parts``, ``classes``, ``channels`` and ``problems`` of
            `inspect_data`.
        pictures: sample pictures with their labels drawn.
    """
    problems = "".join(f"<li>{_text(line)}</li>" for line in report["problems"]) or "<li>nothing</li>"
    body = [
        f"<h1>{_text(report['folder'])}</h1>", f"<p>{_text(report['format'])}, task {_text(report['task'])}</p>",
        "<h2>Training</h2>", f"<pre>{_text(report['recipe'])}</pre>",
        "<h2>Suspicious</h2>", f"<ul>{problems}</ul>",
        "<h2>Classes</h2>", _table(report["classes"]),
        "<h2>Pictures and objects</h2>", _table([_flat(part) for part in report["parts"]]),
        "<h2>Channels</h2>", _table(report["channels"]),
        "<h2>Samples</h2>", *(_figure(name, picture) for name, picture in pictures),
    ]  # fmt: skip
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{_text(report['folder'])}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body) + "\n</body></html>\n"
    )  # fmt: skip


def _text(value: object) -> str:
    return html.escape(str(value).encode(errors="backslashreplace").decode())


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """A dictionary in a cell becomes its text."""
    return {key: ", ".join(f"{name}: {value}" for name, value in cell.items()) if isinstance(cell, dict) else cell
            for key, cell in values.items()}  # fmt: skip


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    titles = "".join(f"<th>{_text(title)}</th>" for title in rows[0])
    lines = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{titles}</tr>{lines}</table>"


def _figure(name: str, picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=85)
    content = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<figure><img alt="" src="data:image/jpeg;base64,{content}"><figcaption>{_text(name)}</figcaption></figure>'
