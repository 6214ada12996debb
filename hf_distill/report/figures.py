"""What every plot is drawn on: one drawing serves the page, light or dark, and a PNG."""

from io import StringIO
from pathlib import Path
from typing import Any

from ..core.escape import html_text
from ..errors import require_package

# Ink becomes the page's own text colour; as it is, it is black on a PNG's white.
INK = "#010203"
COLOURS = {
    "student": "#2f7ed8",
    "control": "#e07b28",
    "teacher": "#2a9d6f",
    "before": "#8f96a3",
    "soft": "#a55fc4",
    "hard": "#c9505e",
}
_CYCLE = ["#2f7ed8", "#e07b28", "#2a9d6f", "#a55fc4", "#c9505e", "#8f96a3", "#b59b1c", "#1fa3b5"]
_STYLE: Any = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.size": 10,
    "grid.alpha": 0.14,
    "grid.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_distill",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def axes(title: str, x: str, y: str, width: float = 6.4, height: float = 3.2, count: int = 1) -> tuple[Any, Any]:
    """(figure, axes) of matplotlib, with the house's colours; several axes side by side are a list.

    Raises:
        DistillError: matplotlib is not installed.
    """
    require_package("matplotlib", "report", "A plot")
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "axes.prop_cycle": cycler(color=_CYCLE)}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.suptitle(title, fontsize="large")
        made = [figure.add_subplot(1, count, i + 1) for i in range(count)]
        for one in made:
            one.set_xlabel(x)
        made[0].set_ylabel(y)
    return figure, made[0] if count == 1 else made


def legend(axes: Any, **options) -> None:
    """The names of what is drawn, in ink."""
    axes.legend(frameon=False, labelcolor=INK, **options)


def _without_formulas(figure: Any) -> Any:
    """The figure, whose names are text, also with dollars in them; numbers at its axes stay formulas."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if text.get_text() and "mathdefault" not in text.get_text():
            text.set_parse_math(False)
    return figure


def svg(figure: Any) -> str:
    """A figure as an element of a page, in the page's text colour, without a fixed size."""
    import matplotlib

    text = StringIO()
    with matplotlib.rc_context(_STYLE):
        _without_formulas(figure).savefig(
            text, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    element = text.getvalue()
    element = element[element.index("<svg") :].replace(INK, "currentColor")
    name = html_text(figure.get_suptitle())
    width, height = (f"{inches * 72:g}pt" for inches in figure.get_size_inches())
    return element.replace(
        f'width="{width}" height="{height}"', f'role="img" aria-label="{name}" style="max-width: {width}"', 1
    )


def png(figure: Any, path: Path) -> Path:
    """A figure as a file, on white."""
    _without_formulas(figure).savefig(path, format="png", dpi=160, facecolor="white")
    return path
