"""The report's charts: drawn by matplotlib as SVG, coloured by the page that holds them.

Each colour is drawn as a placeholder, which becomes a custom property of CSS (`var(--ink)`), so that one
drawing is right on a light page, on a dark one, and on paper. Texts stay texts.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

from mcp_lora.evaluation import Split
from mcp_lora.scoring import ERRORS

# What a page must define: --ink, --line, --right, --series-0 to 5 for models or runs, --error-0 to 7.
SERIES = tuple(f"series-{place}" for place in range(6))
WRONG = {error: f"error-{place}" for place, error in enumerate(ERRORS)}
_INK, _LINE, _RIGHT = "ink", "line", "right"
_PLACEHOLDERS = {name: f"#0a0b{place:02x}" for place, name in enumerate([_INK, _LINE, _RIGHT, *SERIES])}
_PLACEHOLDERS |= {name: f"#0a0c{place:02x}" for place, name in enumerate(WRONG.values())}
_WIDTH = 5.4  # inches, so that a telephone shows letters of nine points at about that size


def figures(split: Split) -> str:
    """Return bars of a split's figures, one a model, in % with their 95 % intervals."""
    models = list(split.figures)
    names = list(split.figures[models[0]])
    height = 0.8 / len(models)
    with _drawing(0.7 + 0.13 * len(names) * (1 + len(models))) as (axes, chart):
        for number, model in enumerate(models):
            shares = [split.figures[model][name] for name in names]
            places = [place + height * (number - (len(models) - 1) / 2) for place in range(len(names))]
            middle = [100 * share.share for share in shares]
            reach = [
                [100 * max(0.0, share.share - share.low) for share in shares],
                [100 * max(0.0, share.high - share.share) for share in shares],
            ]
            axes.barh(places, middle, 0.9 * height, color=_colour(number))
            axes.errorbar(middle, places, xerr=reach, fmt="none", ecolor=_PLACEHOLDERS[_INK], elinewidth=0.9)
            for place, share in zip(places, shares, strict=True):
                axes.text(102, place, f"{100 * share.share:.0f}", va="center", fontsize=7.5)
        axes.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 100), xlabel="% of the questions")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    return chart("figures by model, with their intervals")


def errors(splits: Mapping[str, Split]) -> str:
    """Return a bar for each split and model: the share that is right, and of each first error."""
    rows = [(name, model, split) for name, split in splits.items() for model in split.errors]
    with _drawing(0.6 + 0.22 * len(rows)) as (axes, chart):
        for place, (_, model, split) in enumerate(rows):
            counts = split.errors[model]
            left = 0.0
            right = split.count - sum(counts.values())
            parts = [(_RIGHT, right), *((WRONG[error], counts.get(error, 0)) for error in ERRORS)]
            for colour, count in parts:
                width = 100 * count / split.count
                axes.barh(place, width, 0.7, left, color=_PLACEHOLDERS[colour])
                left += width
        axes.set(yticks=range(len(rows)), yticklabels=[f"{name} · {model}" for name, model, _ in rows])
        axes.set(xlim=(0, 100), xlabel="% of the questions")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    return chart("right answers and first errors, by split and model")


def curves(lines: Sequence[tuple[int, bool, Sequence[tuple[float, float]]]], name: str) -> str:
    """Return curves over the steps.

    Args:
        lines: each the number of its colour, whether it is dashed, and (step, value) pairs.
        name: of the values.
    """
    with _drawing(2.4) as (axes, chart):
        for number, dashed, points in lines:
            style = "o--" if dashed else "-" if len(points) > 1 else "o"
            axes.plot(*zip(*points, strict=True), style, color=_colour(number), linewidth=1.6, markersize=4)
        axes.set(xlabel="step", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    return chart(f"{name} over the steps")


def histogram(bins: Sequence[tuple[int, int, int]]) -> str:
    """Return how many samples have from `low` to `high` tokens, for each (low, high, count)."""
    with _drawing(2.2) as (axes, chart):
        lows, highs, counts = zip(*bins, strict=True)
        widths = [max(1, high - low) for low, high in zip(lows, highs, strict=True)]
        axes.bar(lows, counts, [0.92 * width for width in widths], align="edge", color=_colour(1))
        axes.set(xlabel="tokens of a sample", ylabel="samples")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="x", visible=False)
    return chart("lengths of the samples")


def _colour(number: int) -> str:
    return _PLACEHOLDERS[SERIES[number % len(SERIES)]]


@contextmanager
def _drawing(height: float) -> Iterator[tuple[Any, Callable[[str], str]]]:
    """Yield axes to draw on, and a function that returns the drawing when it is done, given its title."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink, line = _PLACEHOLDERS[_INK], _PLACEHOLDERS[_LINE]
    settings: dict[str, Any] = {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.sans-serif": ["DejaVu Sans"],  # to measure by; the page's own font shows
        "font.size": 8.5,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), line),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
    }
    with rc_context(settings):
        figure = Figure((_WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.tick_params(length=0)

        def chart(title: str) -> str:
            with rc_context(settings | {"svg.hashsalt": title}), warnings.catch_warnings():
                # matplotlib's own font lacks some letters; it is the reader's font that shows them
                warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
                return _svg(figure, title)

        yield axes, chart


def _svg(figure: Any, title: str) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    for name, placeholder in _PLACEHOLDERS.items():
        text = text.replace(placeholder, f"var(--{name})")
    return text
