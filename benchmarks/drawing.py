"""What chapter 11 draws: costs under the roof of their processor, and their growth."""

from __future__ import annotations

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter

from mmlib.figures import note

COLOURS, MARKERS = [f"C{number}" for number in range(7)], "osD^vP*X"  # the palette that ``figures.set_style`` sets
_PRECISIONS = {"fp32": "-", "bf16": "--"}


def roofline(lines: pd.DataFrame, ceilings: pd.DataFrame) -> Figure:
    """Draw measured lines under the roof of their processor, a panel each, numbered by a legend.

    lines: columns mark (lines of one name share it), where, intensity (FLOP a byte), reached (FLOP/s); ceilings:
    columns where, precision, compute (FLOP/s), copy (bytes/s).
    """
    places = list(ceilings["where"].unique())
    figure, axes = plt.subplots(len(places), squeeze=False, figsize=(7.4, 4.2 * len(places)), layout="constrained")
    for ax, place in zip(axes[:, 0], places):
        part = lines[lines["where"] == place]
        over = np.geomspace(min([1, *part["intensity"] / 2]), max([1_000, *part["intensity"] * 2]), 200)
        for roof in ceilings[ceilings["where"] == place].to_dict("records"):
            attainable, dash = np.minimum(roof["compute"], over * roof["copy"]) / 1e9, _PRECISIONS[roof["precision"]]
            ax.plot(over, attainable, dash, color="0.4", linewidth=1.2, label=roof["precision"])
        marks = zip(cycle(MARKERS), cycle(COLOURS))
        for (name, row), (marker, colour) in zip(part.groupby("mark", sort=False), marks):
            ax.plot(row["intensity"], row["reached"] / 1e9, marker, color=colour, markersize=6, label=name)
        ax.set(xscale="log", yscale="log", xlabel="operations a byte (FLOP/B)", ylabel="operations (GFLOP/s)")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.text(0.01, 1.02, place, transform=ax.transAxes, fontsize=9)
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    note(axes[0, 0], lines)
    return figure


def growth(points: pd.DataFrame, fits: pd.DataFrame) -> Figure:
    """Draw seconds over size, a panel for every cost and axis, and the fitted power laws.

    points: columns cost, axis, where, size, seconds; fits: columns cost, axis, where, exponent, middle (size) and
    centre (seconds on the fitted line there).
    """
    series = list(points.groupby(["cost", "axis"], sort=False))
    columns = min((3, 2), key=lambda count: -len(series) % count)  # so that as few places as can be stay empty
    rows = max(1, -(-len(series) // columns))
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=(9, 2.3 * rows), layout="constrained")
    styles = dict(zip(points["where"].unique(), cycle(zip(MARKERS, COLOURS))))
    for ax, ((cost, axis), part) in zip(axes.flat, series):
        for place, there in part.groupby("where", sort=False):
            marker, colour = styles[place]
            ax.plot(there["size"], there["seconds"], marker, color=colour, markersize=5, label=place)
            fit = fits[(fits["cost"] == cost) & (fits["axis"] == axis) & (fits["where"] == place)]
            for row in fit.to_dict("records"):
                line = row["centre"] * (there["size"] / row["middle"]) ** row["exponent"]
                ax.plot(there["size"], line, color=colour, linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel=axis, ylabel=cost, xticks=sorted(part["size"].unique()))
        wide = part["seconds"].max() > 30 * part["seconds"].min()
        ax.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        for direction, unit in ((ax.xaxis, ""), (ax.yaxis, "s")):
            direction.set_major_formatter(EngFormatter(unit, sep=""))
            direction.set_minor_formatter(NullFormatter())
    for ax in axes.flat[len(series) :]:
        ax.remove()
    if series:
        note(axes[0, 0], points.drop(columns="fixed"))
        known = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels())}
        figure.legend(known.values(), known.keys(), loc="outside upper center", ncols=2)
    return figure
