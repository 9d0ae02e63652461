"""The one way in which a page is drawn: a template, in which a missing value is an error and text is escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jinja2

from steerable.pages import words
from steerable.store.text import plural, printable


@cache
def environment() -> jinja2.Environment:
    """With the words and figures that templates use."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (words.short, words.percent, words.number, words.fixed, words.signed, words.times, words.visible)
    made.filters.update({function.__name__: function for function in filters})
    made.filters["g"] = lambda value: f"{value:g}"
    made.globals.update(zip=zip, plural=plural, words=words, MISSING=words.MISSING)
    return made


def render(name: str, **content: object) -> str:
    """A page, or a part of one, from its template."""
    return environment().get_template(name).render(**content)
