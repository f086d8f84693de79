"""How a figure looks on a phone: as wide as that, panels below each other, letters as large as on any page."""

from __future__ import annotations

import pickle
import re
import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.legend import Legend
from matplotlib.ticker import FixedLocator, MaxNLocator
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

NARROW, LOW = 4.2, 2.8  # inches, of a drawing and of one of its panels, where letters stay legible
LOWEST = 1.8  # inches, of what is drawn between the axes of a panel
SHORT_LABEL, INSIDE_LABEL = 12, 58  # letters of a row beside an axis, and of a line inside it
MOST_LETTERS = 30  # of the ticks, or in a line of the label, of an axis
MOST_NAMES = 3  # beside each other in a legend


def narrowed(figure: Figure) -> Figure:
    """Return a copy of a figure for a narrow screen, its panels below each other in their order, each with its labels.

    The figure itself stays as it is, and pyplot does not know the copy.
    """
    figure = pickle.loads(pickle.dumps(figure))
    plt.close(figure)
    placed = [ax for ax in figure.axes if ax.get_subplotspec()]
    height = _stack(figure, placed)
    lowest = {ax: _label_inside(ax) or LOWEST for ax in placed if ax.get_aspect() == "auto"}
    figure.set_size_inches(min(NARROW, figure.get_figwidth()), height)
    for ax in figure.axes:
        _break_words(ax)
    for ax in filter(Axes.get_legend, figure.axes):
        box = ax.get_legend().get_window_extent()
        if box.x0 >= ax.bbox.x1 or box.y0 >= ax.bbox.y1 or box.width > 0.9 * figure.bbox.width:
            _legend_across(ax)
    for legend in list(figure.legends):
        _in_fewer_columns(legend)
    if lowest:
        _heighten(figure, lowest)
    return figure


def _stack(figure: Figure, placed: Sequence[Axes]) -> float:
    """Place axes below each other, each with the labels that it had from others; return the height in inches."""
    height = figure.get_figheight()
    rows, columns = placed[0].get_gridspec().get_geometry() if placed else (1, 1)
    if columns == 1:
        return height
    for ax in placed:
        first = placed[ax.get_subplotspec().num1 // columns * columns]
        ax.set_ylabel(ax.get_ylabel() or first.get_ylabel())
        ax.tick_params(labelleft=True, labelbottom=True)
    for ax, place in zip(placed, GridSpec(len(placed), 1, figure)):
        ax.set_subplotspec(place)
    return len(placed) * min(height / rows, LOW)


def _break_words(ax: Axes) -> None:
    """Break the labels of the axes, and have fewer or slanted ticks below, where they would not fit."""
    for axis in (ax.xaxis, ax.yaxis):
        lines = (textwrap.fill(line, MOST_LETTERS) for line in axis.get_label_text().splitlines())
        axis.set_label_text("\n".join(lines))
    ticks = [re.sub(r"\$.*\$", "100", label.get_text()) for label in ax.get_xticklabels()]  # a power, as a formula
    if isinstance(ax.xaxis.get_major_locator(), MaxNLocator):
        ax.locator_params(axis="x", nbins=4)
    elif len("".join(ticks)) > MOST_LETTERS:
        ax.tick_params(axis="x", rotation=60)


def _label_inside(ax: Axes) -> float:
    """Write the label of each row above its marks, where it takes no width; return the height of the axes in inches.

    Nothing is done, and 0 returned, where the labels are short, or not those of rows.
    """
    labels = [label.get_text().replace("-\n", "-").replace("\n", " ") for label in ax.get_yticklabels()]
    named = isinstance(ax.yaxis.get_major_locator(), FixedLocator) and ax.get_lines() and not ax.yaxis_inverted()
    places = np.concatenate([[0.0], *(line.get_ydata(orig=False) for line in ax.get_lines())])
    beside = np.unique((places - places.round()).round(3))  # of the marks of a row
    aside = beside.max()
    if not named or max(map(len, labels), default=0) <= SHORT_LABEL or aside > 0.3:  # these are no rows
        return 0
    labels = [textwrap.fill(label, INSIDE_LABEL) for label in labels]
    for place, label in zip(ax.get_yticks(), labels):
        point = {"xy": (0, place + aside), "xycoords": ax.get_yaxis_transform(), "textcoords": "offset points"}
        ax.annotate(label, xytext=(2, 4), va="bottom", fontsize=9, gid="inside", **point).set_in_layout(False)
    ax.tick_params(axis="y", left=False, labelleft=False)
    ax.set_ylim(min(ax.get_yticks()) - aside - 0.3, max(ax.get_yticks()) + 1 - aside)
    points = max((11 * max(label.count("\n") + 1 for label in labels) + 13) / (1 - 2 * aside), 14 * (len(beside) - 1))
    return float(np.ptp(ax.get_ylim()) * points / 72)


def _legend_across(ax: Axes) -> None:
    """Put the legend above the axes and what is written there, in as many columns as a narrow drawing has room for."""
    figure, title = ax.figure.get_figure(root=True), ax.get_legend().get_title().get_text()
    lift = max([0, *(text.get_window_extent().y1 - ax.bbox.y1 for text in ax.texts)]) / figure.dpi
    over = ax.transAxes + ScaledTranslation(0, lift, figure.dpi_scale_trans)
    place = {"bbox_to_anchor": (0.5, 1), "bbox_transform": blended_transform_factory(figure.transFigure, over)}
    for columns in range(MOST_NAMES, 0, -1):
        legend = ax.legend(loc="lower center", ncols=columns, title=title, **place)
        if legend.get_window_extent().width < 0.95 * figure.bbox.width:
            break
    legend.set_in_layout(False)  # the axes need not be as wide, and a blank keeps its height
    height = 72 * (legend.get_window_extent().y1 - ax.bbox.y1) / figure.dpi
    ax.annotate(" ", (0.5, 1), xytext=(0, height), xycoords="axes fraction", textcoords="offset points", va="top")


def _in_fewer_columns(legend: Legend) -> None:
    """Put the legend of a figure in as many columns as there is room for."""
    figure, names = legend.figure, [text.get_text() for text in legend.get_texts()]
    for columns in range(MOST_NAMES, 0, -1):
        if legend.get_window_extent().width > 0.95 * figure.bbox.width:
            legend.remove()
            legend = figure.legend(legend.legend_handles, names, loc="outside upper center", ncols=columns)


def _heighten(figure: Figure, lowest: dict[Axes, float]) -> None:
    """Make a figure as high as it has to be for each of its axes to have its least height, in inches."""
    height, count = figure.get_figheight(), next(iter(lowest)).get_gridspec().nrows
    tall = height + 2 * count * LOWEST  # what stands around the axes takes the same height in it
    figure.set_figheight(tall)
    figure.draw_without_rendering()
    lacking = max(low - ax.get_position(original=True).height * tall for ax, low in lowest.items())
    figure.set_figheight(max(height, tall + count * lacking))
