"""How the book looks: one palette, one function per kind of figure, numbers and notices for the prose.

A drawing function takes a tidy frame and an optional ``ax`` and returns the ``ax``.  Nothing here computes a result.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter

from mmlib import compare

# Okabe and Ito's colours: told apart by colour-blind readers, in grey by the markers beside them.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#777777",
)
COLOURS = {
    "mean": GREY,
    "norm": SKY,
    "quality": BLUE,
    "best half": PURPLE,
    "learned scores": "#000000",
    "NAN": ORANGE,
    "NAN, two blocks": ORANGE,
    "NAN + scores": ORANGE,
    "attention": GREEN,
    "attention + scores": GREEN,
    "DANet + scores": GREEN,
    "as coded": RED,
    "nearest": GREY,
    "class means": SKY,
    "whitened means": PURPLE,
    "linear": ORANGE,
    "mlp": BLUE,
    "one identity": BLUE,
    "two identities": ORANGE,
    "labelled person": BLUE,
    "another person": RED,
    "paired": BLUE,
    "unpaired": ORANGE,
    "no fallback": GREY,
    "clips without a face": SKY,
    "described": BLUE,
    "coded": RED,
    "coded, scale 30": ORANGE,
    "lowest 1%": BLUE,
    "lowest 5%": ORANGE,
    "published": "#000000",
    "seeds": "#000000",
    "views": BLUE,
    "bagging": RED,
    "stratified": ORANGE,
    "as stored": BLUE,
    "principal axes": ORANGE,
    "softmax": GREY,
    "cosine softmax": SKY,
    "margin": BLUE,
    "margin + focal": ORANGE,
    "margin + batch focal": RED,
    "margin, scores": GREEN,
    "margin + focal, scores": PURPLE,
    "margin + focal, raw scores": "#000000",
    "margin 0": SKY,
    "margin 0.3": GREEN,
    "margin 0.5": BLUE,
    "margin 0.7": "#000000",
    "margin 0.5, gamma 2": ORANGE,
    "gamma 0": BLUE,
    "gamma 0.5": SKY,
    "gamma 1": GREEN,
    "gamma 2": ORANGE,
    "gamma 4": RED,
    "cross-entropy": BLUE,
    "focal, clip by clip": ORANGE,
    "focal, over the batch": RED,
    "face": BLUE,
    "scene": GREY,
    "scene 32": GREEN,
    "scene 64": GREEN,
    "scene 128": GREEN,
    "scene 256": GREEN,
    "scene 128, gated": PURPLE,
    "score fusion": ORANGE,
    "head": SKY,
    "body": SKY,
    "audio": SKY,
    "all": RED,
}
MARKERS = "osD^vP*X<>"


def set_style() -> None:
    """Set the style of every figure: quiet axes, no titles, a white ground that also stands on a dark page."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        rc={
            "figure.figsize": (7, 4),
            "figure.dpi": 110,
            "savefig.bbox": "tight",
            "axes.edgecolor": "0.4",
            "grid.color": "0.9",
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 10,
            "axes.labelsize": 10,
            "legend.fontsize": 9,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.title_fontsize": 9,
        },
    )


def panels(columns: int, *, width: float = 3.6, height: float = 3.4, **options) -> tuple[Figure, Sequence[Axes]]:
    """Make ``columns`` axes side by side; inches each."""
    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained", **options)
    return figure, np.atleast_1d(axes)


# -- prose ----------------------------------------------------------------------------------------------------------


def glue(name: str, value: float | int | str) -> None:
    """Make a value available to the prose as ``{glue:text}`` (numbers may carry a format there)."""
    if isinstance(value, np.generic):
        value = value.item()
    _record(name, {"text/plain": repr(value)})


def glue_difference(name: str, row: Mapping, **words: str) -> None:
    """Paste a row of a comparison into prose: ``name`` (the difference, signed), ``name-interval`` and ``name-verdict``.

    words: as of ``compare.verdict``.
    """
    glue(name, compare.signed(row["difference"]))
    glue(f"{name}-interval", compare.interval_text(row))
    glue(f"{name}-verdict", compare.verdict(row, **words))


def notice(simulated: bool, detail: str = "") -> None:
    """Say on the page, and in a plain notebook, whether its numbers are simulated; pasted as ``notice``."""
    text = (
        "Every number and figure on this page comes from <b>simulated clips</b>, a stand-in calibrated on published "
        "marginals. None of them is a result on iQIYI-VID-2019."
        if simulated
        else "The numbers on this page come from a data set of the reader's own, not from the simulator."
    )
    title = "Simulated data" if simulated else "Data of one's own"
    body = (
        f'<div class="simulated admonition"><p class="admonition-title">{title}</p>'
        f"<p>{text} {html.escape(detail)}</p></div>"
    )
    _record("notice", {"text/html": body, "text/plain": repr(title)})


def _record(name: str, data: dict[str, str]) -> None:
    prefix = "application/papermill.record/"
    display(
        {prefix + kind: text for kind, text in data.items()},
        raw=True,
        metadata={"scrapbook": {"name": name, "mime_prefix": prefix}},
    )


def signed(low: float, high: float, gain: str, loss: str, open_: str) -> str:
    """Choose the verdict that an interval supports: above 0, below 0, or neither (also for NaN)."""
    return gain if low > 0 else loss if high < 0 else open_


# -- drawings -------------------------------------------------------------------------------------------------------


def forest(
    frame: pd.DataFrame,
    *,
    label: str,
    value: str,
    xlabel: str,
    low: str = "low",
    high: str = "high",
    reference: float | None = 0.0,
    ax: Axes | None = None,
) -> Axes:
    """Draw one row a method, best on top: ``value`` with its interval, and a line at ``reference``."""
    ax = ax or plt.gca()
    frame = frame.sort_values(value)
    for place, row in enumerate(frame.to_dict("records")):
        error = [[max(0, row[value] - row[low])], [max(0, row[high] - row[value])]] if np.isfinite(row[low]) else None
        ax.errorbar(row[value], place, xerr=error, fmt="o", capsize=3, color=COLOURS.get(row[label], "0.2"))
    if reference is not None:
        ax.axvline(reference, color="0.5", linewidth=0.8)
    ax.set(yticks=range(len(frame)), yticklabels=frame[label], xlabel=xlabel, ylim=(-0.6, len(frame) - 0.4))
    ax.grid(axis="y", visible=False)
    return ax


def lines(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    by: str,
    xlabel: str,
    ylabel: str,
    ax: Axes | None = None,
    connect: bool = True,
    legend: bool = True,
) -> Axes:
    """Draw markers for every value of ``by``, over categories in the order of the frame, joined if that has a sense."""
    ax = ax or plt.gca()
    places = {name: i for i, name in enumerate(frame[x].unique())}
    for marker, (name, part) in zip(cycle(MARKERS), frame.groupby(by, sort=False)):
        ax.plot(
            part[x].map(places),
            part[y],
            marker=marker,
            markersize=5,
            label=name,
            color=COLOURS.get(name),
            linestyle="-" if connect else "none",
        )
    ax.set(xticks=range(len(places)), xlabel=xlabel, ylabel=ylabel)
    ax.set_xticklabels(places, rotation=60 if len(places) > 5 else 0)
    if legend:
        ax.legend()
    return ax


def against_target(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how far each calibrated fact is from its target, in tolerances; columns fact, deviation, within."""
    ax = ax or plt.gca()
    place = np.arange(len(frame))[::-1]
    ax.axvspan(-1, 1, color="0.93")
    ax.axvline(0, color="0.5", linewidth=0.8)
    for within, marker, colour in ((True, "o", BLUE), (False, "X", RED)):
        chosen = (frame["within"] == within).to_numpy()
        ax.plot(
            frame["deviation"].clip(-3, 3)[chosen],
            place[chosen],
            marker,
            color=colour,
            label="within" if within else "missed",
        )
    ax.set(yticks=place, yticklabels=frame["fact"], xlim=(-3.1, 3.1), xlabel="achieved − target (tolerances)")
    ax.legend()
    return ax


def curves(
    drawn: pd.DataFrame,
    points: pd.DataFrame,
    *,
    x: str,
    y: str,
    xlabel: str,
    ylabel: str,
    ax: Axes | None = None,
    log: bool = False,
) -> Axes:
    """Draw a distribution of the store as a line and the published points on it."""
    ax = ax or plt.gca()
    ax.plot(drawn[x], drawn[y], color=BLUE, label="this store")
    ax.plot(points[x], points[y], "o", color=ORANGE, markersize=5, label="published")
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if log else "linear")
    ax.legend()
    return ax


def densities(frame: pd.DataFrame, *, value: str, by: str, xlabel: str, ax: Axes | None = None) -> Axes:
    """Draw one outlined histogram, of area 1, a value of ``by``."""
    ax = ax or plt.gca()
    bins = np.linspace(frame[value].min(), frame[value].max(), 60)
    for style, (name, part) in zip(cycle(("-", "--", ":")), frame.groupby(by, sort=False)):
        ax.hist(
            part[value],
            bins,
            density=True,
            histtype="step",
            linewidth=1.6,
            linestyle=style,
            label=name,
            color=COLOURS.get(name),
        )
    ax.set(xlabel=xlabel, ylabel="density")
    ax.legend()
    return ax


def frame_weights(frame: pd.DataFrame, axes: Sequence[Axes]) -> Sequence[Axes]:
    """Draw the weight of every frame of some clips, a clip a panel, a method a line, wrong frames shaded.

    frame: columns clip, frame (position), method, weight (share of the clip), wrong (bool).
    """
    for ax, (clip, part) in zip(axes, frame.groupby("clip", sort=False)):
        for marker, (method, line) in zip(cycle(MARKERS), part.groupby("method", sort=False)):
            ax.plot(
                line["frame"],
                line["weight"],
                marker=marker,
                markersize=3,
                linewidth=1,
                label=method,
                color=COLOURS.get(method),
            )
        for position in part.loc[part["wrong"], "frame"].unique():
            ax.axvspan(position - 0.5, position + 0.5, color=RED, alpha=0.12, linewidth=0)
        ax.set(xlabel="frame", ylabel="weight (share of the clip)" if ax is axes[0] else "")
    axes[0].legend()
    return axes


def verdict_grid(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    xlabel: str,
    ylabel: str,
    limit: float,
    columns: Sequence[float],
    rows: Sequence[float],
    ax: Axes | None = None,
) -> Axes:
    """Draw differences (points) on a grid: colour is the sign, a dot says that the interval excludes 0.

    frame: columns ``x``, ``y``, difference, low, high; at most one row a cell.  columns, rows: the values of ``x`` and
    ``y`` to draw; a cell without a row of the frame stays empty.
    """
    ax = ax or plt.gca()
    table = frame.pivot(index=y, columns=x, values="difference")
    table = table.reindex(index=sorted(rows, reverse=True), columns=sorted(columns))
    sns.heatmap(
        table,
        ax=ax,
        cmap="RdBu",
        center=0,
        vmin=-limit,
        vmax=limit,
        annot=True,
        fmt="+.1f",
        cbar=False,
        linewidths=1,
        annot_kws={"fontsize": 9},
    )
    sure = frame[(frame["low"] > 0) | (frame["high"] < 0)]
    for _, row in sure.iterrows():
        ax.plot(list(table.columns).index(row[x]) + 0.88, list(table.index).index(row[y]) + 0.16, "k.", markersize=5)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def verdict_grids(frame: pd.DataFrame) -> Figure:
    """Draw ``verdict_grid`` for every learned arm (rows) and reliability (columns) of ``aggregation.grid_frame``."""
    arms, reliabilities = frame["aggregator"].unique(), sorted(frame["reliability"].unique())
    figure, axes = plt.subplots(
        max(1, len(arms)),
        max(1, len(reliabilities)),
        squeeze=False,
        layout="constrained",
        figsize=(3.0 * max(1, len(reliabilities)), 2.3 * max(1, len(arms))),
    )
    limit = max(0.5, frame["difference"].abs().max()) if len(frame) else 1.0
    for line, (row, arm) in enumerate(zip(axes, arms)):
        for ax, reliability in zip(row, reliabilities):
            part = frame[(frame["aggregator"] == arm) & (frame["reliability"] == reliability)]
            verdict_grid(
                part,
                x="share",
                y="wrong quality",
                limit=limit,
                ax=ax,
                columns=frame["share"].unique(),
                rows=frame["wrong quality"].unique(),
                xlabel="share of wrong frames (factor)",
                ylabel=f"{arm}:\nquality of wrong faces" if ax is row[0] else "",
            )
            if line == 0:
                ax.text(0, 1.03, f"reliability {reliability:g}", transform=ax.transAxes, fontsize=9)
    return figure


def late_hits(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the AP that one irrelevant clip costs, by the rank where it stands.

    frame: columns relevant (clips of the identity), rank (from 1), loss (AP, a fraction).
    """
    ax = ax or plt.gca()
    for marker, (relevant, part) in zip(cycle(MARKERS), frame.groupby("relevant")):
        ax.plot(part["rank"], part["loss"], marker=marker, markersize=4, label=f"{relevant}")
    ax.set(xscale="log", xlabel="rank of the irrelevant clip", ylabel="AP lost (fraction)")
    ax.legend(title="relevant clips")
    return ax


def interval_width(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the width of a bootstrap interval against the number of identities, with its normal approximation.

    frame: columns identities, width, normal (both MAP@100, a fraction); one row a draw of identities.
    """
    ax = ax or plt.gca()
    ax.plot(frame["identities"], frame["width"], "o", color=BLUE, label="bootstrap")
    line = frame.sort_values("identities")
    ax.plot(line["identities"], line["normal"], color=ORANGE, label="normal approximation")
    scale = "log" if frame["width"].gt(0).any() else "linear"  # where every identity is found, no interval has a width
    ax.set(xscale="log", yscale=scale, xlabel="identities", ylabel="width of the interval (MAP@100)")
    for axis in (ax.xaxis, ax.yaxis) if scale == "log" else (ax.xaxis,):  # plain numbers that do not touch
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    ax.legend()
    return ax


def paired_intervals(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the difference of two runs seed by seed, with a paired and an unpaired interval.

    frame: columns seed, kind ("paired" or "unpaired"), difference, low, high (MAP@100, fractions).
    """
    ax = ax or plt.gca()
    places = {seed: place for place, seed in enumerate(sorted(frame["seed"].unique()))}
    for shift, marker, (kind, part) in zip((-0.12, 0.12), MARKERS, frame.groupby("kind"), strict=False):
        error = [part["difference"] - part["low"], part["high"] - part["difference"]]
        ax.errorbar(
            part["seed"].map(places) + shift,
            part["difference"],
            yerr=error,
            fmt=marker,
            capsize=3,
            label=kind,
            color=COLOURS[kind],
        )
    ax.axhline(0, color="0.5", linewidth=0.8)
    ax.set(xlabel="seed", ylabel="difference in MAP@100", xticks=list(places.values()), xlim=(-0.5, len(places) - 0.5))
    ax.set_xticklabels([str(seed) for seed in places])
    ax.legend()
    return ax


def dodged(
    frame: pd.DataFrame,
    *,
    label: str,
    value: str,
    by: str,
    xlabel: str,
    low: str = "low",
    high: str = "high",
    ax: Axes | None = None,
) -> Axes:
    """Draw one row a ``label``, in the order of the frame from the top, and in it one mark a ``by`` with its interval."""
    ax = ax or plt.gca()
    rows, kinds = list(frame[label].unique()), list(frame[by].unique())
    for marker, (shift, kind) in zip(cycle(MARKERS), enumerate(kinds)):
        part = frame[frame[by] == kind]
        place = [
            -rows.index(name) - 0.5 * (shift - (len(kinds) - 1) / 2) / max(1, len(kinds) - 1) for name in part[label]
        ]
        error = [(part[value] - part[low]).clip(lower=0).fillna(0), (part[high] - part[value]).clip(lower=0).fillna(0)]
        ax.errorbar(
            part[value], place, xerr=error, fmt=marker, capsize=3, markersize=5, label=kind, color=COLOURS.get(kind)
        )
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set(yticks=[-i for i in range(len(rows))], yticklabels=rows, xlabel=xlabel, ylim=(-len(rows) + 0.5, 0.5))
    ax.grid(axis="y", visible=False)
    if kinds:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(kinds))
    return ax


def partition(frame: pd.DataFrame, *, xlabel: str, ylabel: str = "member", ax: Axes | None = None) -> Axes:
    """Draw one row a member, first on top: the dimensions that it keeps, pale, and those that it discards.

    frame: columns member, start, stop (exclusive), width, all but the first in dimensions.
    """
    ax = ax or plt.gca()
    ax.barh(frame["member"], frame["width"], height=0.7, color="0.88", label="kept")
    ax.barh(
        frame["member"], frame["stop"] - frame["start"], left=frame["start"], height=0.7, color=RED, label="discarded"
    )
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(frame["member"].max() + 0.6, -0.6), xlim=(0, frame["width"].max()))
    ax.grid(visible=False)
    return ax


def gains(
    frame: pd.DataFrame, *, x: str, by: str, xlabel: str, ylabel: str, ax: Axes | None = None, legend: bool = True
) -> Axes:
    """Draw differences with their intervals over numbers that double, a line for every value of ``by``.

    frame: columns ``x`` (positive), ``by``, difference, low, high (points; NaN where there is no interval).
    """
    ax = ax or plt.gca()
    names = list(frame[by].unique())
    for place, (marker, name) in enumerate(zip(cycle(MARKERS), names)):
        part = frame[frame[by] == name]
        error = [(part["difference"] - part["low"]).clip(lower=0), (part["high"] - part["difference"]).clip(lower=0)]
        shift = 2 ** (0.1 * (place - (len(names) - 1) / 2))  # beside each other, so that no bar hides another
        ax.errorbar(
            part[x] * shift,
            part["difference"],
            yerr=error,
            marker=marker,
            markersize=5,
            capsize=3,
            linewidth=1.2,
            label=name,
            color=COLOURS.get(name),
        )
    ax.axhline(0, color="0.5", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set(xticks=sorted(frame[x].unique()), xlabel=xlabel, ylabel=ylabel)
    ax.set_xticklabels([f"{value:g}" for value in sorted(frame[x].unique())])
    if legend:
        ax.legend()
    return ax


def traces(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    by: str,
    xlabel: str,
    ylabel: str,
    low: str | None = None,
    high: str | None = None,
    markers: bool = False,
    dodge: float = 0.0,
    legend: str = "best",
    ax: Axes | None = None,
) -> Axes:
    """Draw ``y`` over a quantity ``x``, one line a value of ``by``, with bars from ``low`` to ``high`` if they are given.

    dodge: how far apart, in units of ``x``, the points of different lines stand; bars that are not finite are left out.
    legend: where it stands, also ``outside`` (to the right) or ``none``; a single line has none.
    """
    ax = ax or plt.gca()
    names = list(frame[by].unique())
    for place, (name, marker, dash) in enumerate(zip(names, cycle(MARKERS), cycle(("-", "--", "-.", ":")))):
        part = frame[frame[by] == name]
        at = part[x] + dodge * (place - (len(names) - 1) / 2)
        colour = COLOURS.get(name, "0.2" if len(names) == 1 else None)
        (line,) = ax.plot(
            at, part[y], linestyle=dash, marker=marker if markers else None, markersize=5, label=name, color=colour
        )
        if low is not None:
            error = np.abs([part[y] - part[low], part[high] - part[y]])
            finite = np.isfinite(error).all(0)
            ax.errorbar(
                at[finite],
                part.loc[finite, y],
                yerr=error[:, finite],
                fmt="none",
                capsize=3,
                ecolor=line.get_color(),
                elinewidth=1,
            )
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if len(names) > 1 and legend != "none":
        ax.legend(**{"loc": "upper left", "bbox_to_anchor": (1, 1)} if legend == "outside" else {"loc": legend})
    return ax


def sweep(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    xlabel: str,
    ylabel: str,
    low: str = "low",
    high: str = "high",
    each: pd.DataFrame | None = None,
    reference: float | None = 0.0,
    colour: str = BLUE,
    ax: Axes | None = None,
) -> Axes:
    """Draw ``y`` with its interval over the values of a setting, evenly spaced in the order of the frame and joined.

    each: columns seed, ``x`` and ``y``, drawn as a thin line a seed behind the mean.
    """
    ax = ax or plt.gca()
    places = {value: i for i, value in enumerate(frame[x])}
    for style, (_, part) in zip(cycle((":", "--", "-.")), [] if each is None else each.groupby("seed")):
        part = part[part[x].isin(places)]
        ax.plot(part[x].map(places), part[y], linestyle=style, linewidth=1, color="0.6")
    error = np.nan_to_num([frame[y] - frame[low], frame[high] - frame[y]]).clip(min=0)
    ax.errorbar(range(len(frame)), frame[y], yerr=error, fmt="o-", capsize=3, markersize=5, color=colour)
    if reference is not None:
        ax.axhline(reference, color="0.5", linewidth=0.8)
    ax.set(
        xticks=range(len(frame)),
        xticklabels=[value if isinstance(value, str) else f"{value:g}" for value in places],
        xlabel=xlabel,
        ylabel=ylabel,
        xlim=(-0.5, len(frame) - 0.5),
    )
    return ax


# -- scenes ---------------------------------------------------------------------------------------------------------

COLOURS |= {
    "fine-tuned network": BLUE,
    "untrained network": GREY,
    "thumbnail": SKY,
    "show and set": "#000000",
    "simulated vectors": ORANGE,
    "own vectors": ORANGE,
    "train": SKY,
    "val": BLUE,
}
RIGHT, WRONG = {"edgecolor": GREEN, "linestyle": "-"}, {"edgecolor": RED, "linestyle": (0, (2, 1.5))}


def _without_pictures(ax: Axes) -> Axes:
    """Say in the place of a drawing that there is nothing to draw."""
    ax.text(0.5, 0.5, "no pictures", ha="center", va="center", transform=ax.transAxes, color="0.4")
    ax.set(xticks=[], yticks=[])
    return ax


def picture_rows(frame: pd.DataFrame, ax: Axes | None = None, *, inch: float = 0.95) -> Axes:
    """Draw pictures in rows, those that are marked in a frame: a line where right, dashes where wrong.

    frame: columns row (label), picture ((S, S, 3) uint8), mark ("right", "wrong" or "").  inch: side of a picture.
    """
    ax = ax or plt.gca()
    if frame.empty:
        return _without_pictures(ax)
    labels = list(dict.fromkeys(frame["row"]))
    longest = frame.groupby("row").size().max()
    for line, label in enumerate(labels):
        for place, cell in enumerate(frame[frame["row"] == label].to_dict("records")):
            ax.imshow(cell["picture"], extent=(place + 0.06, place + 0.94, line + 0.94, line + 0.06))
            if cell["mark"]:
                style = RIGHT if cell["mark"] == "right" else WRONG
                ax.add_patch(plt.Rectangle((place + 0.05, line + 0.05), 0.9, 0.9, fill=False, linewidth=2.4, **style))
    ax.set(xlim=(0, longest), ylim=(len(labels), 0), xticks=[], aspect="equal")
    ax.set_yticks([line + 0.5 for line in range(len(labels))], labels)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.figure.set_size_inches(inch * longest + 1.2, inch * len(labels) + 0.2)
    return ax


def training_curves(frame: pd.DataFrame, axes: Sequence[Axes]) -> Sequence[Axes]:
    """Draw the loss of every epoch, and the share of train and val clips recognised; two axes.

    frame: columns epoch, loss (nats), train, val (shares), seed.
    """
    if frame.empty:
        return [_without_pictures(ax) for ax in axes]
    for _, part in frame.groupby("seed"):
        axes[0].plot(part["epoch"], part["loss"], color=BLUE, marker="o", markersize=3)
        for marker, name in zip(MARKERS, ("train", "val")):
            axes[1].plot(part["epoch"], part[name], color=COLOURS[name], marker=marker, markersize=3, label=name)
    axes[0].set(xlabel="epoch", ylabel="loss (nats)", ylim=(0, None))
    axes[1].set(xlabel="epoch", ylabel="clips recognised (share)", ylim=(0, 1))
    handles, labels = axes[1].get_legend_handles_labels()
    axes[1].legend(handles[:2], labels[:2])
    return axes


def show_confusion(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the share of val clips of each show (rows) whose nearest train clip is of each show (columns)."""
    ax = ax or plt.gca()
    if table.empty:
        return _without_pictures(ax)
    text = table.map(lambda share: f"{100 * share:.0f}" if share > 0 else "").to_numpy()
    sns.heatmap(
        table,
        ax=ax,
        cmap="Blues",
        vmin=0,
        vmax=1,
        annot=text,
        fmt="",
        linewidths=0.5,
        cbar=False,
        annot_kws={"fontsize": 8},
    )
    ax.set(xlabel="show of the nearest train clip", ylabel="show of the val clip")
    ax.tick_params(axis="y", rotation=0)
    return ax


def occlusion_maps(pictures: np.ndarray, maps: np.ndarray) -> Figure:
    """Draw pictures (n, S, S, 3), n at least 1, and under each its occlusion map (n, S, S), on one scale of cosine."""
    n = len(pictures)
    figure, axes = plt.subplots(
        2, max(n, 1), squeeze=False, figsize=(1.25 * max(n, 1) + 0.9, 2.7), layout="constrained"
    )
    if not n:
        figure.delaxes(axes[1, 0])
        _without_pictures(axes[0, 0])
        return figure
    limit = float(np.abs(maps).max()) or 1.0
    for place in range(n):
        axes[0, place].imshow(pictures[place])
        axes[1, place].imshow(pictures[place].mean(-1), cmap="gray", vmin=0, vmax=255)
        drawn = axes[1, place].imshow(maps[place], cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.65)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.grid(visible=False)
    figure.colorbar(drawn, ax=list(axes[1]), label="cosine lost", shrink=0.95)
    return figure


# -- cost -----------------------------------------------------------------------------------------------------------

PRECISIONS = {"fp32": "-", "bf16": "--"}


def roofline(lines: pd.DataFrame, ceilings: pd.DataFrame) -> Figure:
    """Draw measured lines under the roof of their processor, a panel each, numbered by a legend.

    lines: columns mark (lines of one name share it), where, intensity (FLOP a byte), reached (FLOP/s); ceilings: columns
    where, precision, compute (FLOP/s), copy (bytes/s).
    """
    places = list(ceilings["where"].unique())
    figure, axes = plt.subplots(len(places), squeeze=False, figsize=(7.4, 4.2 * len(places)), layout="constrained")
    for ax, place in zip(axes[:, 0], places):
        part = lines[lines["where"] == place]
        over = np.geomspace(min([1, *part["intensity"] / 2]), max([1_000, *part["intensity"] * 2]), 200)
        for roof in ceilings[ceilings["where"] == place].to_dict("records"):
            ax.plot(
                over,
                np.minimum(roof["compute"], over * roof["copy"]) / 1e9,
                PRECISIONS[roof["precision"]],
                color="0.4",
                linewidth=1.2,
                label=roof["precision"],
            )
        for (name, row), marker, colour in zip(
            part.groupby("mark", sort=False), cycle(MARKERS), cycle((BLUE, ORANGE, GREEN, RED, PURPLE, SKY, "#000000"))
        ):
            ax.plot(row["intensity"], row["reached"] / 1e9, marker, color=colour, markersize=6, label=name)
        ax.set(xscale="log", yscale="log", xlabel="operations a byte (FLOP/B)", ylabel="operations (GFLOP/s)")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.text(0.01, 1.02, place, transform=ax.transAxes, fontsize=9)
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure


def growth(points: pd.DataFrame, fits: pd.DataFrame) -> Figure:
    """Draw seconds over size, a panel for every cost and axis, and the fitted power laws.

    points: columns cost, axis, where, size, seconds; fits: columns cost, axis, where, exponent, middle (size) and centre
    (seconds on the fitted line there).
    """
    series = list(points.groupby(["cost", "axis"], sort=False))
    rows = max(1, -(-len(series) // 3))
    figure, axes = plt.subplots(rows, 3, squeeze=False, figsize=(9, 2.7 * rows), layout="constrained")
    places = {
        place: style for place, style in zip(points["where"].unique(), cycle(zip(MARKERS, (BLUE, ORANGE, GREEN, RED))))
    }
    for ax, ((cost, axis), part) in zip(axes.flat, series):
        for place, rows_there in part.groupby("where", sort=False):
            marker, colour = places[place]
            ax.plot(rows_there["size"], rows_there["seconds"], marker, color=colour, markersize=5, label=place)
            fit = fits[(fits["cost"] == cost) & (fits["axis"] == axis) & (fits["where"] == place)]
            for row in fit.to_dict("records"):
                ax.plot(
                    rows_there["size"],
                    row["centre"] * (rows_there["size"] / row["middle"]) ** row["exponent"],
                    color=colour,
                    linewidth=1,
                )
        ax.set(xscale="log", yscale="log", xlabel=axis, ylabel=cost, xticks=sorted(part["size"].unique()))
        ax.yaxis.set_major_locator(
            LogLocator(subs=(1,) if part["seconds"].max() > 30 * part["seconds"].min() else (1, 2, 5))
        )
        for direction, unit in ((ax.xaxis, ""), (ax.yaxis, "s")):
            direction.set_major_formatter(EngFormatter(unit, sep=""))
            direction.set_minor_formatter(NullFormatter())
    for ax in axes.flat[len(series) :]:
        ax.remove()
    if series:
        known = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels())}
        figure.legend(known.values(), known.keys(), loc="outside upper center", ncols=2)
    return figure
