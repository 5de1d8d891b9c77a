"""Self-contained HTML pages: no server, no script, no request to anywhere but the songs beside them.

The template escapes everything and forbids the browser, by a content security policy, to load or run anything else.
"""

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import jinja2

from acestep_lora.hashes import replacing

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


@dataclass(frozen=True)
class Card:
    """Something to listen to: `audio` is a URL, `picture` a PNG, `texts` are long and folded away."""

    title: str
    audio: str = ""
    picture: bytes = b""
    problems: Sequence[str] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A heading and any of: a note, histograms (title -> label -> count), a table (first row: head), cards, points,
    figures (what they show -> PNG), a grid of cards (row -> column -> card)."""

    title: str
    note: str = ""
    histograms: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    table: Sequence[Sequence[str]] = ()
    cards: Sequence[Card] = ()
    points: Sequence[str] = ()
    figures: Mapping[str, bytes] = field(default_factory=dict)
    grid: Mapping[str, Mapping[str, Card]] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Those of the grid, in the order in which its rows name them."""
        return list(dict.fromkeys(column for row in self.grid.values() for column in row))


def embedded(png: bytes) -> str:
    """A PNG as a URL that needs no file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def link(file: Path, page: Path) -> str:
    """URL of a file as seen from a page: relative, so that both can move together, unless on another drive."""
    try:
        return quote(Path(os.path.relpath(file, page.parent)).as_posix())
    except ValueError:
        return file.absolute().as_uri()


def write_page(
    path: Path, title: str, facts: Mapping[str, str], sections: Sequence[Section], refresh: int | None = None
) -> Path:
    """Write a page headed by a title and a line of facts. refresh: seconds after which a browser reads it again."""
    values = {"title": title, "facts": facts, "sections": sections, "refresh": refresh, "embedded": embedded}
    stream = _TEMPLATES.get_template("page.html").stream(values)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(stream)
    return path
