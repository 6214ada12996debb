"""Axes and styles of all plots, and their output as SVG for the page and as PNG."""

from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.escape import html_text
from ..errors import require_package

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The SVG replaces this color with the text color of the page; in a PNG it is nearly black on white.
TEXT_COLOR = "#010203"
COLORS = {
    "student": "#2f7ed8",
    "control": "#e07b28",
    "teacher": "#2a9d6f",
    "before": "#8f96a3",
    "soft": "#a55fc4",
    "hard": "#c9505e",
}
_COLOR_CYCLE = ["#2f7ed8", "#e07b28", "#2a9d6f", "#a55fc4", "#c9505e", "#8f96a3", "#b59b1c", "#1fa3b5"]
_STYLE: dict = {
    "axes.edgecolor": TEXT_COLOR,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": TEXT_COLOR,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.size": 10,
    "grid.alpha": 0.14,
    "grid.color": TEXT_COLOR,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_distill",
    "text.color": TEXT_COLOR,
    "xtick.color": TEXT_COLOR,
    "ytick.color": TEXT_COLOR,
}


def axes(
    title: str, x: str, y: str, width: float = 6.4, height: float = 3.2, count: int = 1
) -> "tuple[Figure, list[Axes]]":
    """Return (figure, axes) of matplotlib in the common style; the axes are in one row.

    Args:
        title: of the figure.
        x: label of the x axis.
        y: label of the first y axis.
        width: inches.
        height: inches.
        count: number of axes.

    Raises:
        DistillError: matplotlib is not installed.
    """
    require_package("matplotlib", "report", "A plot")
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "axes.prop_cycle": cycler(color=_COLOR_CYCLE)}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.suptitle(title, fontsize="large")
        subplots = [figure.add_subplot(1, count, i + 1) for i in range(count)]
        for subplot in subplots:
            subplot.set_xlabel(x)
        subplots[0].set_ylabel(y)
    return figure, subplots


def legend(subplot: "Axes", fontsize: str | None = None) -> None:
    """Add a legend in the text color."""
    subplot.legend(frameon=False, labelcolor=TEXT_COLOR, fontsize=fontsize)


def _disable_formulas(figure: "Figure") -> "Figure":
    """Show labels with dollar signs as plain text; tick labels remain formulas, because matplotlib formats them so."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if text.get_text() and "mathdefault" not in text.get_text():
            text.set_parse_math(False)
    return figure


def svg(figure: "Figure") -> str:
    """Return a figure as an SVG element with the page's text color and without a fixed size."""
    import matplotlib

    text = StringIO()
    with matplotlib.rc_context(_STYLE):
        _disable_formulas(figure).savefig(
            text, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    element = text.getvalue()
    element = element[element.index("<svg") :].replace(TEXT_COLOR, "currentColor")
    name = html_text(figure.get_suptitle())
    width, height = (f"{inches * 72:g}pt" for inches in figure.get_size_inches())
    return element.replace(
        f'width="{width}" height="{height}"', f'role="img" aria-label="{name}" style="max-width: {width}"', 1
    )


def png(figure: "Figure", path: Path) -> Path:
    """Write a figure as a PNG on white, and return the path."""
    _disable_formulas(figure).savefig(path, format="png", dpi=160, facecolor="white")
    return path
