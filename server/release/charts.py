"""The report's curves, as inline SVG.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe and Ito: safe for colour blindness


def curve(
    rounds: Sequence[int], lines: Mapping[str, Sequence[float | None]], *, ylabel: str, ceiling: float | None = None
) -> str:
    """Lines over training rounds as an SVG element; `ceiling` draws a dashed line."""
    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, values) in enumerate(lines.items()):
        points = [(r, v) for r, v in zip(rounds, values, strict=True) if v is not None]
        axes.plot(
            [r for r, _ in points], [v for _, v in points], label=name, color=_COLOURS[number % len(_COLOURS)],
            marker="o", markersize=3, linewidth=1.5, linestyle=("-", "--", "-.", ":")[number % 4],
        )  # fmt: skip
    if ceiling is not None:
        axes.axhline(ceiling, color="#555555", linestyle=(0, (4, 3)), linewidth=1)
        axes.text(1.0, ceiling, "ceiling ", transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
        axes.set_ylim(0, ceiling * 1.12)
    axes.set_xlabel("round")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "synthward"}):  # else its names are drawn at random
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Type": None, "Format": None}
        )
    text = buffer.getvalue().decode()
    return text[text.index("<svg") :]
