"""Points of a figure that show a text on hover, on tap and on keyboard focus, without a script."""

from __future__ import annotations

import re
from html import escape, unescape

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_MARK = "tip: "  # begins the gid of such a point
_POINT = re.compile(rf'<g id="{_MARK}([^"]*)">')
_READ_AT, _ROOM = 0.965, 0.06  # where the text stands above the axes, and its share of the figure's height


def make_room(figure: Figure) -> None:
    """Keeps a line free at the top of a figure."""
    figure.set_layout_engine("constrained", rect=(0.0, 0.0, 1.0, 1.0 - _ROOM))


def add_tip(axes: Axes, x: float, y: float, text: str) -> None:
    """Adds an invisible point at (x, y) with a text."""
    axes.plot(x, y, ".", color="#3b6fb6", ms=22, alpha=0.01, mew=0, gid=f"{_MARK}{text}")


def with_tips(svg: str) -> str:
    """The <svg> element with its points readable by pointer and keyboard, and announced by screen readers."""

    def point(match: re.Match[str]) -> str:
        text = escape(unescape(match[1]))
        return (
            f'<g class="tip" tabindex="0" role="img" aria-label="{text}">'
            f'<text x="50%" y="{100 * (1 - _READ_AT):.1f}%">{text}</text>'
        )

    return _POINT.sub(point, svg)
