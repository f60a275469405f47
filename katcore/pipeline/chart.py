"""Small pictures as SVG text: curves, and a rate with its interval. No script, no dependency."""

import html
import math
from collections.abc import Iterable, Sequence

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 320, 150, 44, 10, 12, 22
_MAX_POINTS = 400
Point = tuple[float, float]

_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROLS |= {0x7F: 0x2421, 0xFEFF: 0xFFFD}
_CONTROLS |= dict.fromkeys(
    (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD
)
_CONTROLS |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)


def escape(text: object) -> str:
    """Untrusted text for HTML: markup is inert, and control characters are visible."""
    return html.escape(str(text).translate(_CONTROLS))


def curve(title: str, points: Iterable[Point], *, low: float | None = None) -> str:
    """A line over steps, thin as measured and thick as its moving mean; empty without two points.

    `low` fixes the lower end of the vertical axis.
    """
    finite = [point for point in points if math.isfinite(point[1])]
    if len(finite) < 2:
        return ""
    measured = finite[:: math.ceil(len(finite) / _MAX_POINTS)]
    smooth = _moving_mean(measured)
    values = [value for _, value in measured]
    bottom, top = min(values) if low is None else low, max(values)
    top = top if top > bottom else bottom + 1
    first, last = measured[0][0], measured[-1][0]

    def path(line: Sequence[Point]) -> str:
        return " ".join(
            f"{_LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT):.1f},"
            f"{_HEIGHT - _BOTTOM - (y - bottom) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM):.1f}"
            for x, y in line
        )

    base = _HEIGHT - _BOTTOM
    return (
        f"<figure><figcaption>{escape(title)} <b>{_number(smooth[-1][1])}</b></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'<path class="axis" d="M{_LEFT} {_TOP}V{base}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 5}" y="{_TOP + 8}" text-anchor="end">{top:.3g}</text>'
        f'<text x="{_LEFT - 5}" y="{base}" text-anchor="end">{bottom:.3g}</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 7}">step {first + 1:.0f}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 7}" text-anchor="end">{last + 1:.0f}</text>'
        f'<polyline class="raw" points="{path(measured)}"/>'
        f'<polyline class="mean" points="{path(smooth)}"/></svg></figure>'
    )


def interval(value: float, low: float, high: float) -> str:
    """A rate in [0, 1] as a dot on its interval."""
    x, left, right = (4 + 112 * number for number in (value, low, high))
    return (
        '<svg class="interval" viewBox="0 0 120 12" aria-hidden="true"><path class="axis" d="M4 6H116"/>'
        f'<path class="range" d="M{left:.1f} 6H{right:.1f}"/><circle cx="{x:.1f}" cy="6" r="3.5"/></svg>'
    )


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _moving_mean(points: Sequence[Point]) -> list[Point]:
    """Over the last tenth of all points."""
    width = max(1, len(points) // 10)
    means = []
    for at, (x, _) in enumerate(points):
        window = points[max(0, at - width + 1) : at + 1]
        means.append((x, sum(value for _, value in window) / len(window)))
    return means
