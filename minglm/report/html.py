"""Pieces of the page. Whatever comes from a run is escaped here; only what is `Html` goes in as it is."""

import math
from collections.abc import Sequence
from html import escape

from minglm.evals.interval import Estimate

LONG = 40  # characters of a cell whose lines may break


class Html(str):
    """Markup of ours, in which all text is escaped already."""


def html(text: str) -> Html:
    return text if isinstance(text, Html) else Html(escape(text))


def section(anchor: str, title: str, paper: str, *body: str) -> Html:
    """paper: where in the report it is spoken of. body: plain text becomes a paragraph."""
    inside = "".join(one if isinstance(one, Html) else f"<p>{escape(one)}</p>" for one in body)
    where = f'<span class="paper">{escape(paper)}</span>' if paper else ""
    return Html(f'<section id="{anchor}"><h2><a href="#{anchor}">{escape(title)}</a> {where}</h2>{inside}</section>')


def later(text: str) -> Html:
    """What will stand here when its data is there."""
    return Html(f'<p class="later">To come: {escape(text)}</p>')


def paragraph(*parts: str, kind: str = "") -> Html:
    name = f' class="{kind}"' if kind else ""
    return Html(f"<p{name}>{''.join(map(html, parts))}</p>")


def heading(text: str) -> Html:
    return Html(f"<h3>{escape(text)}</h3>")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Html:
    """The first cell of a row is its name. A wide one scrolls by itself."""
    top = "".join(f"<th>{html(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{_cell('th', row[0])}{''.join(_cell('td', cell) for cell in row[1:])}</tr>" for row in rows)
    below = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return Html(f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>{below}')


def _cell(tag: str, text: str) -> str:
    kind = ' class="long"' if len(text) > LONG else ""
    return f"<{tag}{kind}>{html(text)}</{tag}>"


def charts(*pairs: tuple[str, str]) -> Html:
    """(SVG, caption) side by side, as many as fit."""
    inside = "".join(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" for svg, caption in pairs)
    return Html(f'<div class="charts">{inside}</div>')


def folded(title: str, *inside: str) -> Html:
    return Html(f"<details><summary>{escape(title)}</summary>{''.join(map(html, inside))}</details>")


def commands(*lines: str) -> Html:
    """Lines as they stand, to be copied."""
    return Html(f'<pre class="commands">{escape(chr(10).join(lines))}</pre>')


def interval(numbers: Sequence[float | None] | None, digits: int = 2) -> str:
    """Value, low, high -> `0.25 [0.15, 0.40]`."""
    return "–" if numbers is None else Estimate(*numbers, count=0).text(digits)


def si(value: float) -> str:
    """With the letter of its unit: 12,300,000 is `12.3 M`."""
    for unit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:,.3g} {letter}" if abs(value) < 999.5 * unit else f"{value / unit:,.0f} {letter}"
    return f"{value:,.0f} "


def duration(seconds: float) -> str:
    """3:07, or 1:02:07."""
    whole = math.ceil(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
