"""Charts as SVG within the page: text stays text, and the page's style sheet gives the colours, so that both its themes have
their own. Every chart is `WIDTH` units wide, which fits a phone; a wide page puts several side by side.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Literal, NamedTuple

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 36
LETTER = 6.5  # width of one at the charts' size, about
Bounds = tuple[float | None, float | None]


class Series(NamedTuple):
    """points (x, y); bounds: of each point its interval, if there are any. color: 0 to 5, of the style sheet. pale: what a
    stronger line of the same colour sums up, without a name in the legend."""

    label: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    style: Literal["line", "dots", "pale"] = "line"
    bounds: Sequence[Bounds] = ()


class Row(NamedTuple):
    """Of a chart of intervals: dots with their intervals, each in the colour of its series; None where nothing is known."""

    label: str
    values: Sequence[tuple[float, float | None, float | None] | None]


def lines(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    marks: Sequence[tuple[float, str]] = (),
    y_range: Bounds = (None, None),
) -> str:
    """Curves over x. marks: vertical lines, each with a name to its left."""
    known = [one for one in series if one.points]
    xs = [x for one in known for x, _ in one.points] + [x for x, _ in marks]
    ys = [y for one in known for _, y in one.points]
    ys += [bound for one in known for pair in one.bounds for bound in pair if bound is not None]
    x_low, x_high = _range(xs, (0.0, None))
    y_low, y_high = _range(ys, y_range)
    legend, top = _legend([(one.label, one.color) for one in known if one.style != "pale"])
    bottom = HEIGHT + top - BOTTOM

    def x_of(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        return bottom - (value - y_low) / (y_high - y_low) * (bottom - top - TOP)

    parts = [legend, *_grid(ticks(y_low, y_high), y_of, LEFT, WIDTH - RIGHT)]
    for value in ticks(x_low, x_high, 6):
        parts.append(text(x_of(value), bottom + 15, number(value), "middle"))
    start = x_low
    for value, name in marks:
        parts.append(f'<path class="mark" d="M{x_of(value):.1f} {top + TOP}V{bottom:.1f}"/>')
        if len(name) * LETTER < x_of(value) - x_of(start):
            parts.append(text((x_of(start) + x_of(value)) / 2, bottom - 4, name, "middle", "faint"))
        start = value
    for one in sorted(known, key=lambda one: one.style != "pale"):
        for (x, _), (low, high) in zip(one.points, one.bounds, strict=False):
            if low is not None and high is not None:
                parts.append(f'<path class="bar c{one.color}" d="M{x_of(x):.1f} {y_of(low):.1f}V{y_of(high):.1f}"/>')
        path = "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in _thinned(one.points))
        if len(one.points) > 1:
            parts.append(f'<path class="{one.style} c{one.color}" d="M{path}"/>')
        if one.style == "dots" or len(one.points) == 1:
            parts += [f'<circle class="c{one.color}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.8"/>' for x, y in one.points]
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT + top - 5, x_label, "middle", "faint"))
    parts.append(_turned(13, (top + TOP + bottom) / 2, y_label))
    return figure(parts, HEIGHT + top, f"{y_label} over {x_label}")


def intervals(rows: Sequence[Row], names: Sequence[str], x_label: str, x_range: Bounds = (0.0, 1.0)) -> str:
    """A line of dots for each row, with intervals; names: of the series."""
    legend, top = _legend([(name, color) for color, name in enumerate(names)])
    step = 9
    height_of = len(names) * step + 10
    left = min(190.0, 16 + LETTER * max((len(row.label) for row in rows), default=0))
    flat = [value for row in rows for one in row.values if one for value in one if value is not None]
    low, high = _range(flat, x_range)
    bottom = top + TOP + len(rows) * height_of

    def x_of(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - RIGHT - 6)

    parts = [legend]
    for value in ticks(low, high):
        parts.append(f'<path class="grid" d="M{x_of(value):.1f} {top + 4}V{bottom:.1f}"/>')
        parts.append(text(x_of(value), bottom + 15, number(value), "middle"))
    for place, row in enumerate(rows):
        y = top + TOP + place * height_of
        parts.append(text(left - 8, y + height_of / 2, row.label, "end"))
        if place:
            parts.append(f'<path class="grid" d="M8 {y - 1:.1f}H{WIDTH - RIGHT}"/>')
        for color, one in enumerate(row.values):
            if one is None:
                continue
            value, lower, upper = one
            at = y + 7 + color * step
            if lower is not None and upper is not None:
                parts.append(f'<path class="bar c{color}" d="M{x_of(lower):.1f} {at}H{x_of(upper):.1f}"/>')
            parts.append(f'<circle class="c{color}" cx="{x_of(value):.1f}" cy="{at}" r="3.2"/>')
    parts.append(text((left + WIDTH - RIGHT) / 2, bottom + 31, x_label, "middle", "faint"))
    return figure(parts, bottom + 38, x_label)


def bars(rows: Sequence[tuple[str, float, str]], x_label: str) -> str:
    """Horizontal bars: label, value, and what stands behind the bar."""
    left = min(200.0, 14 + LETTER * max((len(label) for label, _, _ in rows), default=0))
    behind = 10 + LETTER * max((len(note) for _, _, note in rows), default=0)
    most = max((value for _, value, _ in rows), default=0) or 1
    parts = []
    for place, (label, value, note) in enumerate(rows):
        y = 6 + 19 * place
        width = value / most * (WIDTH - left - behind)
        parts.append(text(left - 8, y + 11, label, "end"))
        parts.append(f'<rect class="c0" x="{left:.1f}" y="{y}" width="{max(width, 0.5):.1f}" height="14" rx="2"/>')
        parts.append(text(left + width + 5, y + 11, note, "start", "faint"))
    return figure(parts, 12 + 19 * len(rows), x_label)


def heat(values: Sequence[Sequence[float]], names: Sequence[str], x_label: str) -> str:
    """A square for each value, the darker the larger, 0 being blank; a row for each name."""
    left = 16 + LETTER * max(map(len, names))
    width = (WIDTH - left - RIGHT) / max(map(len, values))
    height = min(26.0, max(10.0, width * 1.4))
    most = max(max(row) for row in values) or 1
    parts = []
    for place, (name, row) in enumerate(zip(names, values, strict=True)):
        y = 6 + place * (height + 3)
        parts.append(text(left - 8, y + height / 2 + 4, name, "end"))
        for column, value in enumerate(row):
            box = f'x="{left + column * width:.1f}" y="{y:.1f}" width="{width * 0.92:.1f}" height="{height:.1f}"'
            told = f"<title>{escape(name)}, {x_label} {column}: {value:.2f}</title>"
            parts.append(f'<rect class="c0" {box} fill-opacity="{value / most:.2f}">{told}</rect>')
    bottom = 6 + len(values) * (height + 3)
    parts.append(
        text(
            (left + WIDTH - RIGHT) / 2,
            bottom + 14,
            f"{x_label}; darkest: {number(most)} times its fair share",
            "middle",
            "faint",
        )
    )
    return figure(parts, bottom + 22, f"a row for each of {', '.join(names)}")


def figure(parts: Sequence[str], height: float, title: str, width: float = WIDTH) -> str:
    inside = "".join(parts)
    return f'<svg class="chart" viewBox="0 0 {width:g} {height:.0f}" role="img" aria-label="{escape(title)}">{inside}</svg>'


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within, 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:,.0f}k" if abs(value) < 1e6 else f"{value / 1e6:,.3g}M"
    return f"{value:,.4g}"


def _range(values: Sequence[float], wanted: Bounds) -> tuple[float, float]:
    low = wanted[0] if wanted[0] is not None else min(values, default=0.0)
    high = wanted[1] if wanted[1] is not None else max(values, default=1.0)
    low, high = min([low, *values]), max([high, *values])
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _thinned(points: Sequence[tuple[float, float]], most: int = 400) -> Sequence[tuple[float, float]]:
    every = -(-len(points) // most)
    return [*points[::every], points[-1]] if every > 1 else points


def _grid(values: Sequence[float], y_of: Callable[[float], float], left: float, right: float) -> list[str]:
    found = []
    for value in values:
        found.append(f'<path class="grid" d="M{left} {y_of(value):.1f}H{right}"/>')
        found.append(text(left - 6, y_of(value) + 4, number(value), "end"))
    return found


def _legend(entries: Sequence[tuple[str, int]]) -> tuple[str, float]:
    """In lines that fit -> and the height that it takes."""
    if len(entries) < 2 and not any(label for label, _ in entries):
        return "", 0.0
    x, y, parts = 10.0, 12.0, []
    for label, color in entries:
        width = 26 + LETTER * len(label)
        if x > 10 and x + width > WIDTH:
            x, y = 10.0, y + 16
        parts.append(f'<rect class="c{color}" x="{x:.1f}" y="{y - 7:.1f}" width="10" height="8" rx="2"/>')
        parts.append(text(x + 14, y, label))
        x += width
    return "".join(parts), y + 4


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _turned(x: float, y: float, text: str) -> str:
    at = f'transform="rotate(-90 {x:.1f} {y:.1f})"'
    return f'<text class="faint" x="{x:.1f}" y="{y:.1f}" text-anchor="middle" {at}>{escape(text)}</text>'
