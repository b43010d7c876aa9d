"""Pages from the templates, as one file each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from ppo_rlhf.errors import UserError

HERE = Path(__file__).parent


def rendered(template: str, **context: Any) -> str:
    """A template, in which no text of the context is taken for HTML."""
    environment = Environment(
        loader=FileSystemLoader([HERE / "templates", HERE / "static"]),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**context)


def write_page(page: str, target: Path) -> Path:
    """Writes the page, whole or not at all; → target. Raises UserError where it cannot be written."""
    partial = target.with_name(f"{target.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}.") from error
    return target
