"""The templates of all pages: one environment, in which a missing value is an error and text is escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jinja2

from steerable.evals.lens_tokens import visible
from steerable.pages import panels, words
from steerable.pages.figures import swatch
from steerable.store.text import printable


@cache
def environment() -> jinja2.Environment:
    """With the words and figures that templates use."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(swatch=swatch, MISSING=words.MISSING)
    made.filters.update(
        short=words.short, percent=words.percent, number=words.number, cosine=panels.correlation, visible=visible
    )
    return made


def render(name: str, **content: object) -> str:
    """A page from its template."""
    return environment().get_template(name).render(**content)
