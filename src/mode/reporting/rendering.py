"""Text from the templates beside this file: figures as the tables write them, and markup escaped where it is markup."""

from __future__ import annotations

import base64

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from mode.reporting.plots import are_told_apart, series_colour
from mode.reporting.summary import duration, percent, quantity, times


def render(template: str, **content: object) -> str:
    """A file of `templates/`, filled in. In HTML and SVG all content is text, unless it is `Markup`."""
    return ENVIRONMENT.get_template(template).render(content)


def data_url(picture: str | bytes) -> str:
    """An address that holds a picture: SVG as text, PNG or JPEG as bytes."""
    if isinstance(picture, str):
        kind, picture = "svg+xml", picture.encode()
    else:
        kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


ENVIRONMENT = Environment(
    loader=PackageLoader("mode.reporting"),
    autoescape=select_autoescape(["html", "svg"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.filters |= {
    each.__name__: each for each in (are_told_apart, data_url, duration, percent, quantity, series_colour, times)
}
