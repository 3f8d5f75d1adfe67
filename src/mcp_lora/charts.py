"""The curves of a training: drawn by matplotlib as SVG, coloured by the page that holds them.

Each colour is drawn as a placeholder, which becomes a custom property of CSS (`var(--ink)`), so that one
drawing is right on a light page, on a dark one, and on paper. Texts stay texts.
"""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

_INK, _LINE = "#0a0b00", "#0a0b01"
_SERIES = [f"#0a0c{place:02x}" for place in range(6)]
_COLOURS = {_INK: "ink", _LINE: "line"} | {colour: f"series-{n}" for n, colour in enumerate(_SERIES)}


class Line(NamedTuple):
    """(step, value) pairs to draw in the page's colour --series-`colour`; dashed with dots, or plain."""

    colour: int
    dashed: bool
    points: Sequence[tuple[float, float]]


def curves(lines: Sequence[Line], name: str) -> str:
    """Return the lines over the steps as SVG; `name` is that of the values."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.sans-serif": ["DejaVu Sans"],  # to measure by; the page's own font shows
        "font.size": 8.5,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), _LINE),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
    }
    buffer = io.StringIO()
    with rc_context(settings):
        figure = Figure((5.4, 2.4), layout="constrained")  # inches: on a telephone letters keep their size
        axes = figure.subplots()
        axes.tick_params(length=0)
        for number, dashed, points in lines:
            style = "o--" if dashed else "-" if len(points) > 1 else "o"
            colour = _SERIES[number % len(_SERIES)]
            axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.6, markersize=4)
        axes.set(xlabel="step", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{name} over the steps"', 1)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg
