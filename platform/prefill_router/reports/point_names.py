"""Names beside the points of a figure, where they cover as little as possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox, BboxBase

Point = tuple[float, float]

# The offset from the point and the side of the text that is there, in the order in which they are tried.
_SIDES = ((5, "left"), (-5, "right"), (0, "center"))
_PLACES = [((across, height), side) for height in (-12, 6, -23, 17) for across, side in _SIDES]
_GAP = 3.0  # pixels between a name and points or the curve


def name_points(figure: Figure, axes: Axes, points: Mapping[str, Point], curve: Sequence[Point]) -> None:
    """Writes the name of each point beside it, clear of the other names, the points and the curve if that is possible.

    It has to be the last change of the figure: how large the axes are depends on all others.
    """
    figure.draw_without_rendering()
    room = Bbox([axes.bbox.min, (figure.bbox.x1, axes.bbox.y1)])
    dots = axes.transData.transform(list(points.values()))
    line = Path(axes.transData.transform(curve))
    names: list[BboxBase] = []

    def covered(box: Bbox) -> tuple[float, int, int, bool]:
        wide = box.padded(_GAP)
        return (
            _outside(box, room),
            box.count_overlaps(names),
            wide.count_contains(dots),
            line.intersects_bbox(wide, filled=False),
        )

    for name, point in points.items():
        text = _text(axes, name, point)
        _move(text, *min(_PLACES, key=lambda place: covered(_move(text, *place))))
        names.append(text.get_window_extent())


def _text(axes: Axes, name: str, point: Point) -> Annotation:
    text = axes.annotate(name, point, (0, 0), textcoords="offset points", fontsize=8, parse_math=False)
    text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # legible on top of curves
    text.set_in_layout(False)  # a long name must not make the axes narrow
    return text


def _move(text: Annotation, offset: Point, side: str) -> Bbox:
    """Moves the text, and returns where it then is, in pixels."""
    text.xyann = offset
    text.set_horizontalalignment(side)  # type: ignore[arg-type]
    return text.get_window_extent()


def _outside(box: BboxBase, room: BboxBase) -> float:
    """The pixels by which a box extends beyond the room that there is."""
    ends = (room.x0 - box.x0, box.x1 - room.x1, room.y0 - box.y0, box.y1 - room.y1)
    return sum(max(0.0, end) for end in ends)
