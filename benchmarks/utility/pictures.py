"""Pictures beside the table: figures over epsilon with their intervals, and contact sheets of synthetic images.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from benchmarks.utility.grid import NEARLY_NO_NOISE
from common.images import ImageSet
from server.release.formats import contact_sheet

_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe and Ito: safe for colour blindness
_MARKERS = ("o", "s", "^", "D", "v", "P")
_APART = 0.05  # in log10 of epsilon: bars of two recipes must not lie on each other
_TEXT = 12
_LINE = 18
_GAP = 2


@dataclass(frozen=True)
class Point:
    """One figure at one epsilon, with its interval where there is one."""

    epsilon: float
    value: float
    low: float | None = None
    high: float | None = None


def over_epsilon(lines: Mapping[str, Sequence[Point]], *, ylabel: str, level: tuple[str, float] | None = None) -> str:
    """Points with bars over epsilon, a line a recipe, as SVG; the same input gives the same bytes.

    Args:
        level: name and height of a dashed line.
    """
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    epsilons = sorted({point.epsilon for points in lines.values() for point in points})
    for number, (name, points) in enumerate(lines.items()):
        ordered = sorted(points, key=lambda point: point.epsilon)
        shift = 10 ** (_APART * (number - (len(lines) - 1) / 2))
        below = [p.value - (p.value if p.low is None else min(p.low, p.value)) for p in ordered]
        above = [(p.value if p.high is None else max(p.high, p.value)) - p.value for p in ordered]
        axes.errorbar(
            [p.epsilon * shift for p in ordered], [p.value for p in ordered], yerr=[below, above], label=name,
            color=_COLOURS[number % len(_COLOURS)], marker=_MARKERS[number % len(_MARKERS)], markersize=4,
            linewidth=1.2, capsize=3,
        )  # fmt: skip
    if level is not None:
        axes.axhline(level[1], color="#555555", linestyle=(0, (4, 3)), linewidth=1, label=level[0])
    axes.set_xscale("log")
    axes.set_xticks(epsilons, [f"{e:g}" + ("\n(nearly no noise)" if e == NEARLY_NO_NOISE else "") for e in epsilons])
    axes.minorticks_off()
    axes.set_xlabel("epsilon")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "synthward"}):  # else the ids inside are drawn anew each time
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Type": None, "Format": None}
        )
    return buffer.getvalue().decode()


def sheet(rows: Sequence[tuple[str, ImageSet, int]], caption: str) -> bytes:
    """PNG: for each (name, synthetic images, class) a line of text and a row of its images; then the caption."""
    strips = [Image.open(io.BytesIO(contact_sheet(images, label))) for _, images, label in rows]
    width = max(strip.width for strip in strips)
    font = ImageFont.load_default(_TEXT)
    captions = _wrapped(caption, width, font)
    height = sum(strip.height + _LINE + _GAP for strip in strips) + _LINE * len(captions) + 2 * _GAP
    page = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(page), 0
    for (name, _, _), strip in zip(rows, strips, strict=True):
        draw.text((_GAP, top), name, fill="black", font=font)
        page.paste(strip, (0, top + _LINE))
        top += strip.height + _LINE + _GAP
    for line in captions:
        draw.text((_GAP, top), line, fill="black", font=font)
        top += _LINE
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width - 2 * _GAP and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
