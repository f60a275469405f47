"""Several lines in one picture, as SVG text; a page of pictures. No script, no dependency."""

import math
from collections.abc import Mapping, Sequence

from katcore.pipeline.chart import Point, escape

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM, _ROW = 460, 260, 60, 12, 14, 24, 16
_COLOURS = (
    "#1b6ca8",
    "#d1495b",
    "#2e8b57",
    "#8e5ea2",
    "#e08e0b",
    "#555555",
    "#17a2a2",
    "#7a5230",
    "#c0a000",
    "#000000",
)
_DASHED = ("theory", "without")
_STYLE = (
    "body{font:15px system-ui;margin:2em auto;max-width:1000px;color:#222}figure{display:inline-block;"
    "margin:0 1em 1.5em 0;vertical-align:top}svg{width:460px;font:11px system-ui}"
)


def lines(
    title: str, series: Mapping[str, Sequence[Point]], *, is_log: bool = False, unit: str = ""
) -> str:
    """`picture` in a page, with its title above; nothing if there is no point."""
    drawn = picture(title, series, is_log=is_log, unit=unit)
    return drawn and f"<figure><figcaption>{escape(title)}</figcaption>{drawn}</figure>"


def picture(
    title: str, series: Mapping[str, Sequence[Point]], *, is_log: bool = False, unit: str = ""
) -> str:
    """A line for each name, over what `unit` says; dashed where the name begins with `theory` or `without`.

    With `is_log` both axes are logarithmic, and points that are not above 0 are left out.
    """
    drawn = {
        name: [(_scaled(x, is_log), _scaled(y, is_log)) for x, y in points if not is_log or y > 0]
        for name, points in series.items()
    }
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    if not xs:
        return ""
    x_low, x_high, y_low, y_high = *_wide(xs), *_wide(ys)
    right, base = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    body = [f'<path d="M{_LEFT} {_TOP}V{base}H{right}" fill="none" stroke="#999"/>']
    for row, (name, points) in enumerate(drawn.items()):
        colour = _COLOURS[row % len(_COLOURS)]
        dashed = ' stroke-dasharray="5 4"' if name.startswith(_DASHED) else ""
        path = " ".join(
            f"{_LEFT + (x - x_low) / (x_high - x_low) * (right - _LEFT):.1f},"
            f"{base - (y - y_low) / (y_high - y_low) * (base - _TOP):.1f}"
            for x, y in points
        )
        at = _HEIGHT + _ROW * row + 8
        body.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dashed}/>'
            f'<path d="M{_LEFT} {at - 4}h22" stroke="{colour}" stroke-width="1.8"{dashed}/>'
            f'<text x="{_LEFT + 28}" y="{at}">{escape(name)}</text>'
        )
    ends = ((y_high, _TOP + 8), (y_low, base))
    body += [
        f'<text x="{_LEFT - 5}" y="{at}" text-anchor="end">{_shown(y, is_log)}</text>'
        for y, at in ends
    ]
    body.append(f'<text x="{_LEFT}" y="{base + 15}">{_shown(x_low, is_log)} {escape(unit)}</text>')
    body.append(
        f'<text x="{right}" y="{base + 15}" text-anchor="end">{_shown(x_high, is_log)}</text>'
    )
    height = _HEIGHT + _ROW * len(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}"'
        f' font-family="system-ui" font-size="11" role="img" aria-label="{escape(title)}">'
        f"{''.join(body)}</svg>"
    )


def page(title: str, figures: Sequence[str]) -> str:
    """A page of pictures, to open offline."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>{''.join(figures)}</html>\n"
    )


def _scaled(value: float, is_log: bool) -> float:  # noqa: FBT001 - the axis is one or the other
    return math.log10(value) if is_log else value


def _wide(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _shown(value: float, is_log: bool) -> str:  # noqa: FBT001 - the axis is one or the other
    return f"{10**value if is_log else value:.3g}"
