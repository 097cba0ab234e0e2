"""Small real data files, and rows to put into them."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from alula.data import Sample


def png(shade: int = 0, width: int = 4) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, 4), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def put_pictures(folder: Path) -> Path:
    """The folder, with a.png and b.png in it."""
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(png())
    return folder


def written(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(sample: Sample) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in sample.messages]


def qa(**fields: Any) -> dict[str, Any]:
    return {"question": "what?", "answer": "red", **fields}


def chat(*turns: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **fields}
