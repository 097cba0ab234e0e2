"""A template filled in: one HTML file. Whatever came from data is escaped."""

from pathlib import Path
from typing import Any

import jinja2

from alula.files import write_text


def write_page(path: Path, template: str, view: dict[str, Any]) -> Path:
    """Fills the template of that name with `view` and writes it to `path`.

    Raises:
        UserError: `path` cannot be written.
    """
    loader = jinja2.PackageLoader("alula.report", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_text(path, environment.get_template(template).render(view))
    return path
