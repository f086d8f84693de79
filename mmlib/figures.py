"""How the book looks: one palette, one function per kind of figure, numbers and notices for the prose.

A drawing function takes a tidy frame and an optional ``ax`` and returns the ``ax``.  Nothing here computes a result.
``axis``: further options of ``Axes.set``, such as ``xlabel`` and ``ylabel``.
"""

from __future__ import annotations

import base64
import html
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle, product
from weakref import WeakKeyDictionary

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from IPython.display import HTML, display
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from PIL import Image

from mmlib import compare
from mmlib.narrow import MOST_NAMES, narrowed

# Okabe and Ito's colours: told apart by colour-blind readers, in grey by the markers beside them.
BLACK, BLUE, ORANGE, GREEN, RED = "#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#777777"
# One colour a method for the whole book; the names are those of arms and groups.
_METHODS = {
    BLACK: "learned scores | oracle | published | seeds | margin + focal, raw scores | margin 0.7 | show and set",
    BLUE: "quality | mlp | one identity | labelled person | paired | described | lowest 1% | views | as stored | margin"
    " | margin 0.5 | gamma 0 | cross-entropy | face | faces alone | fine-tuned network | val | this store | within",
    ORANGE: "NAN | NAN, two blocks | NAN + scores | linear | two identities | unpaired | coded, scale 30 | lowest 5%"
    " | stratified | principal axes | margin + focal | margin 0.5, gamma 2 | gamma 2 | focal, clip by clip"
    " | score fusion | simulated vectors | own vectors | as coded, alive",
    GREEN: "attention | attention + scores | DANet + scores | margin, scores | margin 0.3 | gamma 1 | scene 32"
    " | scene 64 | scene 128 | scene 256 | the score itself",
    RED: "as coded | another person | coded | bagging | margin + batch focal | gamma 4 | focal, over the batch | all"
    " | missed",
    PURPLE: "best half | whitened means | margin + focal, scores | scene 128, gated",
    SKY: "norm | class means | clips without a face | cosine softmax | margin 0 | gamma 0.5 | head | body | audio"
    " | thumbnail | train | described, random start | faces with scenes",
    GREY: "mean | nearest | no fallback | softmax | scene | untrained network",
}
COLOURS = {name: colour for colour, names in _METHODS.items() for name in names.split(" | ")}
MARKERS = "osD^vP*X<>"
VERDICTS = {"supported": GREEN, "contradicted": RED, "open": GREY}
DASHES = ("-", "--", "-.", ":")
# Colours that follow the page, light or dark: its ink, its ground, and greys that are seen on either.
ON_ANY_GROUND = {
    BLACK: "currentColor",
    to_hex(".15"): "currentColor",
    to_hex("w"): "var(--pst-color-background, white)",
    to_hex("0.4"): "rgb(128 128 128)",
    to_hex("0.9"): "rgb(128 128 128 / .3)",
    to_hex("0.93"): "rgb(128 128 128 / .2)",
}
WIDEST_LABEL = 34  # letters of a row
_INK, _CHALK = "#222222", "#fefefe"  # letters on a ground of their own
_DRAWN: WeakKeyDictionary[Figure, list[pd.DataFrame]] = WeakKeyDictionary()  # what each figure was drawn from


def set_style() -> None:
    """Set the style of every figure: quiet axes, no titles, letters as large as the page's.

    In a notebook drawings go into it, whatever backend the environment asks for (``MPLBACKEND``).
    """
    if getattr(get_ipython(), "kernel", None):
        get_ipython().enable_matplotlib("inline")
        formatters = get_ipython().display_formatter.formatters
        formatters["image/svg+xml"].for_type(Figure, drawing)
        formatters["image/png"].pop(Figure, None)
    shape = {"figure.figsize": (6.0, 3.6), "savefig.bbox": "tight", "figure.constrained_layout.use": True}
    quiet: dict = {"axes.edgecolor": "0.4", "grid.color": "0.9"}
    quiet |= dict.fromkeys(("legend.frameon", "axes.spines.top", "axes.spines.right"), False)
    small = ("legend.fontsize", "legend.title_fontsize", "xtick.labelsize", "ytick.labelsize")
    text = dict.fromkeys(("font.size", "axes.labelsize"), 11) | dict.fromkeys(small, 10)
    palette = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK]
    sns.set_theme(context="notebook", style="whitegrid", palette=palette, rc=shape | quiet | text)


def panels(columns: int, *, width: float = 3.6, height: float = 3.4, **options) -> tuple[Figure, Sequence[Axes]]:
    """Make ``columns`` axes side by side; inches each."""
    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained", **options)
    return figure, np.atleast_1d(axes)


def glue(name: str, value: float | int | str) -> None:
    """Make a value available to the prose as ``{glue:text}`` (numbers may carry a format there)."""
    if isinstance(value, np.generic):
        value = value.item()
    _record(name, {"text/plain": repr(value)})


def glue_difference(name: str, row: Mapping, **words: str) -> None:
    """Paste a row of a comparison: ``name`` (the difference, signed), ``name-interval`` and ``name-verdict``.

    words: as of ``compare.verdict``.
    """
    glue(name, compare.signed(row["difference"]))
    glue(f"{name}-interval", compare.interval_text(row))
    glue(f"{name}-verdict", compare.verdict(row, **words))


def notice(simulated: bool, detail: str = "", *, public: str = "") -> None:
    """Say on the page, and in a plain notebook, whether its numbers are simulated; pasted as ``notice``.

    public: the public sets of real faces that they come from, instead of a store of the reader's.
    """
    title = "Real faces" if public else "Simulated data" if simulated else "Data of one's own"
    text = "The numbers on this page come from a data set of the reader's own, not from the simulator."
    if simulated:
        text = (
            "What this page computes comes from <b>simulated clips</b>, a stand-in calibrated on published marginals. "
            "None of it is a result on iQIYI-VID-2019. What real video says of the same claims "
            'is in <a class="reference internal" href="12_real_faces.html">Real faces</a>.'
        )
    if public:
        text = (
            f"Every number on this page comes from <b>real faces</b>, of {public}, where it does not say simulated. "
            "Whether the networks were trained on any of these people is unchecked. "
            "None of the numbers is a result on iQIYI-VID-2019."
        )
    head = f'<div class="simulated admonition"><p class="admonition-title">{title}</p>'
    body = f"{head}<p>{text} {html.escape(detail)}</p></div>"
    _record("notice", {"text/html": body, "text/plain": repr(title)})


def drawing(figure: Figure) -> str:
    """Return a figure as SVG with the letters and the ink of the page that it stands in.

    Its metadata has what it was drawn from, as a table (``data``), who made that (``made``), and the same for a narrow
    screen (``narrow``).
    """
    frames = _DRAWN.get(figure, [])
    made = dict.fromkeys(frame.attrs.get("made", "Computed when this page was built.") for frame in frames)
    said = {"data": _as_csv(frames), "made": " ".join([*made, *_intervals(frames)])}
    said["narrow"] = _svg(narrowed(figure), "narrow")
    texts = [f'<metadata class="{kind}">{html.escape(text)}</metadata>' for kind, text in said.items() if text]
    return _svg(figure, "wide").replace(">", ">" + "".join(texts), 1)


def _svg(figure: Figure, kind: str) -> str:
    """Return a figure as SVG of a class, without metadata."""
    file = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mmlib"}):
        figure.savefig(file, format="svg", transparent=True, dpi=144, metadata=dict.fromkeys(("Date", "Creator")))
    drawn = re.sub(r'"data:image/png;base64,([^"]*)"', _smaller, file.getvalue().partition("<svg ")[2])
    drawn = f'<svg class="{kind}" fill="currentColor" {drawn}'  # matplotlib leaves black, the default of SVG, out
    for colour, on_any_ground in ON_ANY_GROUND.items():
        drawn = drawn.replace(colour, on_any_ground)
    drawn = re.sub(r' id="[a-zA-Z]\w*_\d+"|\s*<metadata>.*?</metadata>', "", drawn, flags=re.DOTALL)
    drawn = re.sub(r"(<text[^>]*>)-(?=[.\d])", r"\1−", drawn)  # a minus, where a format has left a hyphen
    drawn = drawn.replace('<g id="inside">', '<g class="inside">')
    return re.sub(r'<g id="tip ([^"]*)">', r"<g><title>\1</title>", drawn)


def _intervals(frames: Sequence[pd.DataFrame]) -> list[str]:
    """Say over what the intervals of frames are, where they know it."""
    known = [frame[["n", "interval"]].dropna() for frame in frames if {"n", "interval"} <= set(frame)]
    over = [f"{n:g} {kind}" for frame in known for n, kind in frame.itertuples(index=False)]
    return [f"Intervals over {compare.listed(dict.fromkeys(over))}."] if over else []


def _smaller(match: re.Match) -> str:
    """Return a picture inside a drawing as JPEG where that takes fewer bytes and shows the same."""
    picture, file = Image.open(io.BytesIO(base64.b64decode(match[1]))), io.BytesIO()
    if picture.convert("RGBA").getextrema()[3] != (255, 255):
        return match[0]
    picture.convert("RGB").save(file, "JPEG", quality=90)
    written = base64.b64encode(file.getvalue()).decode()
    return f'"data:image/jpeg;base64,{written}"' if len(written) < len(match[1]) else match[0]


def _as_csv(frames: Sequence[pd.DataFrame]) -> str:
    """Write what a figure was drawn from as one table, with a column for its panel where there are several."""
    if len(frames) > 1:
        frames = [frame.assign(panel=number) for number, frame in enumerate(frames, start=1)]
    return pd.concat(frames).to_csv(index=False, float_format="%.6g", lineterminator="\n") if frames else ""


def note(ax: Axes, frame: pd.DataFrame) -> None:
    """Remember what axes are drawn from, for ``drawing``: its table, and in ``attrs["made"]`` who made that."""
    _DRAWN.setdefault(ax.figure.get_figure(root=True), []).append(frame)


def glue_drawing(name: str, figure: Figure, alt: str) -> None:
    """Make a figure available to other pages; alt: what it shows."""
    drawn = _svg(figure, "wide") + re.sub(r'(\bid="|url\(#|href="#)', r"\1narrow-", _svg(narrowed(figure), "narrow"))
    plt.close(figure)
    drawn = drawn.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ')
    _record(name, {"text/html": f'<div class="drawing">{drawn}</div>', "text/plain": repr(alt)})


def touch(kind: str, frame: pd.DataFrame, *, label: str, instead: str) -> HTML | None:
    """Return a frame as a figure that a reader can touch, made of it by ``book/_static/touch.js``; nothing if empty.

    kind: clips, grid or identities; what columns each needs stands there.  label: what it is, for a screen reader.
    instead: what is read where no script runs.
    """
    if frame.empty:
        return None
    data = frame.to_json(orient="split", index=False, double_precision=4).replace("<", r"\u003c")  # no tag ends it
    made = frame.attrs.get("made", "Computed when this page was built.")
    shown = f'<p class="instead">{html.escape(instead)}</p><p class="source">{html.escape(made)}</p>'
    shown += f'<script type="application/json">{data}</script>'
    return HTML(f'<div class="touch" data-kind="{kind}" role="group" aria-label="{html.escape(label)}">{shown}</div>')


def _record(name: str, data: dict[str, str]) -> None:
    prefix = "application/papermill.record/"
    metadata = {"scrapbook": {"name": name, "mime_prefix": prefix}}
    display({prefix + kind: text for kind, text in data.items()}, raw=True, metadata=metadata)


def forest(
    frame: pd.DataFrame,
    *,
    label: str,
    value: str,
    by: str = "",
    colours: Mapping[str, str] = COLOURS,
    ax: Axes | None = None,
    **axis,
) -> Axes:
    """Draw one row a ``label``: ``value`` with its interval low to high, and a line at 0.

    by: in every row a mark for each value of it, rows in the order of the frame; without it one mark, best on top.
    colours: of a value of ``by``, or of a label.
    """
    alone, ax = ax is None, ax or plt.gca()
    frame = frame if by else frame.sort_values(value, ascending=False)
    note(ax, frame)
    rows, kinds = list(frame[label].unique()), list(frame[by or label].unique())
    aside = np.linspace(-0.25, 0.25, len(kinds)) if by else np.zeros(len(kinds))
    for kind, shift, marker in zip(kinds, aside, cycle(MARKERS if by else "o")):
        part = frame[frame[by or label] == kind]
        place = [-rows.index(name) - shift for name in part[label]]
        style = {"fmt": marker, "capsize": 3, "label": kind, "color": colours.get(kind, BLACK)}
        bar = ax.errorbar(part[value], place, xerr=_error(part, value), **style)
        if not by:
            said = part.iloc[0]
            measured = f"{compare.signed(said[value])} {compare.interval_text(said)}".replace("-", "−")
            measured = measured if said[value] else "the reference"
            bar.lines[0].set_gid(f"tip {kind}: {measured}")
    ax.axvline(0, color="0.5", linewidth=0.8)
    labels = [textwrap.fill(str(name), WIDEST_LABEL) for name in rows]
    ax.set(yticks=[-i for i in range(len(rows))], yticklabels=labels, ylim=(-len(rows) + 0.4, 0.6), **axis)
    ax.locator_params(axis="x", nbins=7)
    ax.grid(axis="y", visible=False)
    if by and kinds:
        _legend_above(ax, min(MOST_NAMES, len(kinds)))
    if alone:
        lines = max(label.count("\n") + 1 for label in ["", *labels])
        ax.figure.set_size_inches(6.0, 1 + len(rows) * max(0.3, 0.17 * lines + 0.05, 0.14 * len(kinds) if by else 0))
    return ax


def _error(frame: pd.DataFrame, value: str) -> np.ndarray:
    """Return the lengths of bars below and above, (2, n); 0 where there is no interval, and so no bar."""
    return np.nan_to_num([frame[value] - frame["low"], frame["high"] - frame[value]]).clip(min=0)


def traces(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    by: str = "",
    scale: str = "linear",
    bars: bool = False,
    dodge: float = 0.0,
    reference: float | None = None,
    line: Mapping | None = None,
    legend: str = "best",
    ax: Axes | None = None,
    **axis,
) -> Axes:
    """Draw ``y`` over ``x``, one line a value of ``by``, or a single one.

    scale: of ``x``: ``linear``, ``log``, ``doubling`` (ticks at its values) or ``categories``, evenly spaced in the
    order of the frame.  bars: from columns low to high.  dodge: how far apart marks of different lines stand, in units
    of ``x`` or doublings.  reference: a level to draw.  line: options of ``Axes.plot`` for all lines.  legend: where it
    stands, ``above`` the axes, or ``none``; a single line has none.
    """
    ax = ax or plt.gca()
    note(ax, frame)
    ticks = {value: i if scale == "categories" else value for i, value in enumerate(dict.fromkeys(frame[x]))}
    groups = list(frame.groupby(by, sort=False)) if by else [("", frame)]
    for place, ((name, part), marker, dash) in enumerate(zip(groups, cycle(MARKERS), cycle(DASHES))):
        at, shift = part[x].map(ticks).astype(float), dodge * (place - (len(groups) - 1) / 2)
        at = at * 2**shift if scale == "doubling" else at + shift
        colour = COLOURS.get(name, BLUE if len(groups) == 1 else None)
        style = {"linestyle": dash, "marker": marker, "markersize": 5, "color": colour} | dict(line or {})
        (drawn,) = ax.plot(at, part[y], label=name, **style)
        if bars:
            kept = np.isfinite(part["low"])
            error = _error(part[kept], y)
            ax.errorbar(at[kept], part.loc[kept, y], yerr=error, fmt="none", capsize=3, ecolor=drawn.get_color())
    if scale == "linear" and pd.api.types.is_integer_dtype(frame[x]):
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # no half of an epoch
    if scale == "log":
        plain_log(ax, "x")
    if scale == "doubling":
        ax.set_xscale("log", base=2)
    if scale in ("categories", "doubling"):
        names = [value if isinstance(value, str) else f"{value:g}" for value in ticks]
        ax.set_xticks(list(ticks.values()), names, rotation=60 if scale == "categories" and len(names) > 5 else 0)
        ax.minorticks_off()
    if reference is not None:
        ax.axhline(reference, color="0.5", linewidth=0.8)
    ax.set(**axis)
    if len(groups) > 1 and legend != "none":
        if legend == "above":
            _legend_above(ax, min(MOST_NAMES, len(groups)))
        else:
            ax.legend(loc=legend)
    return ax


def _legend_above(ax: Axes, columns: int) -> None:
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns)


def plain_log(ax: Axes, *axes: str) -> Axes:
    """Make axes (``x``, ``y``) logarithmic, in plain numbers that do not touch, where they have a positive value."""
    for name in axes:
        if getattr(ax.dataLim, f"{name}1") > 0:
            ax.set(**{f"{name}scale": "log"})
            plain = {"major_locator": LogLocator(subs=(1, 2, 5)), "major_formatter": StrMethodFormatter("{x:g}")}
            getattr(ax, f"{name}axis").set(minor_formatter=NullFormatter(), **plain)
    return ax


def against_target(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how far each calibrated fact is from its target, in tolerances; columns fact, deviation, within."""
    at = frame["deviation"].clip(-3, 3)
    shown = frame.assign(at=at, place=-np.arange(len(frame)), kind=np.where(frame["within"], "within", "missed"))
    shown = shown.sort_values("within", ascending=False, kind="stable")
    ticks = {"yticks": shown["place"], "yticklabels": frame["fact"], "xlabel": "achieved − target (tolerances)"}
    ax = traces(shown, x="at", y="place", by="kind", line={"linestyle": "none"}, ax=ax, xlim=(-3.1, 3.1), **ticks)
    ax.axvspan(-1, 1, color="0.93", zorder=0)
    ax.axvline(0, color="0.5", linewidth=0.8)
    return ax


def curves(frames: Mapping[str, pd.DataFrame], *, x: str, y: str, ax: Axes | None = None, **axis) -> Axes:
    """Draw two named frames: a line, such as a distribution of the store, and points, such as the published ones."""
    ax = ax or plt.gca()
    for (name, frame), style, colour in zip(frames.items(), ("-", "o"), (BLUE, ORANGE)):
        note(ax, frame.assign(line=name))
        ax.plot(frame[x], frame[y], style, color=colour, markersize=5, label=name)
    ax.set(**axis)
    ax.legend()
    return ax


def densities(frame: pd.DataFrame, *, value: str, by: str, ax: Axes | None = None, **axis) -> Axes:
    """Draw one outlined histogram, of area 1, a value of ``by``."""
    ax = ax or plt.gca()
    bins = np.linspace(frame[value].min(), frame[value].max(), 60)
    for dash, (name, part) in zip(cycle(DASHES), frame.groupby(by, sort=False)):
        style = {"histtype": "step", "linestyle": dash, "color": COLOURS.get(name)}
        density, edges, _ = ax.hist(part[value], bins, density=True, label=name, **style)
        note(ax, pd.DataFrame({by: name, f"{value} from": edges[:-1], "to": edges[1:], "density": density}))
    ax.set(ylabel="density", **axis)
    ax.legend()
    return ax


def frame_weights(frame: pd.DataFrame, axes: Sequence[Axes]) -> Sequence[Axes]:
    """Draw the weight of every frame of some clips, a clip a panel, a method a line, wrong frames shaded.

    frame: columns clip, frame (position), method, weight (share of the clip), wrong (bool).
    """
    for ax, (_, part) in zip(axes, frame.groupby("clip", sort=False)):
        traces(part, x="frame", y="weight", by="method", legend="best" if ax is axes[0] else "none", ax=ax)
        ax.set(xlabel="frame", ylabel="weight (share of the clip)" if ax is axes[0] else "")
        for position in part.loc[part["wrong"], "frame"].unique():
            ax.axvspan(position - 0.5, position + 0.5, color=RED, alpha=0.12, linewidth=0)
    return axes


def attention_maps(maps: Mapping[str, np.ndarray], axes: Sequence[Axes]) -> None:
    """Draw a map (n, n) a panel, on one scale from 0 to 1; below it, its name."""
    for ax, (name, entries) in zip(axes, maps.items(), strict=True):
        note(ax, pd.DataFrame(entries).assign(map=name))
        drawn = ax.imshow(entries, cmap="magma_r", vmin=0, vmax=1)
        ax.set(xlabel=name, xticks=[], yticks=[])
        ax.grid(visible=False)
    axes[0].figure.colorbar(drawn, ax=list(axes), label="share of attention", shrink=0.8)


def verdict_grids(frame: pd.DataFrame) -> Figure:
    """Draw the differences (points) of a sensitivity grid, a panel a learned arm (rows) and a reliability (columns).

    Both stand above the panel.  Colour is the sign, a dot says that the interval excludes 0.  frame: as of
    ``aggregation.grid_frame``.
    """
    arms, reliabilities = frame["aggregator"].unique(), sorted(frame["reliability"].unique())
    high, wide = max(1, len(arms)), max(1, len(reliabilities))
    figure, axes = plt.subplots(high, wide, squeeze=False, layout="constrained", figsize=(3.0 * wide, 2.3 * high))
    note(axes[0, 0], frame)
    limit = max(0.5, frame["difference"].abs().max()) if len(frame) else 1.0
    rows, columns = sorted(frame["wrong quality"].unique(), reverse=True), sorted(frame["share"].unique())
    style = {"cmap": "RdBu", "center": 0, "vmin": -limit, "vmax": limit, "fmt": "+.1f", "cbar": False}
    for (line, arm), (column, reliability) in product(enumerate(arms), enumerate(reliabilities)):
        ax, part = axes[line, column], frame[(frame["aggregator"] == arm) & (frame["reliability"] == reliability)]
        table = part.pivot(index="wrong quality", columns="share", values="difference")
        table = table.reindex(index=rows, columns=columns)
        sns.heatmap(table, annot=table.round(1) + 0.0, ax=ax, linewidths=1, annot_kws={"fontsize": 9}, **style)
        _keep_ink(ax)
        for row in part.to_dict("records"):
            if compare.sign(row):
                place = columns.index(row["share"]) + 0.88, rows.index(row["wrong quality"]) + 0.16
                ax.plot(*place, "o", color=_INK, markersize=3.5, markeredgecolor=_CHALK, markeredgewidth=0.6)
        ax.set(xlabel="share of wrong frames (factor)", ylabel="" if column else "quality of wrong faces")
        ax.text(0, 1.03, f"{arm}, reliability {reliability:g}", transform=ax.transAxes, fontsize=9)
    return figure


def _keep_ink(ax: Axes) -> None:
    """Keep the letters of a heat map as they are on a page of any ground: their own is that of the map."""
    for text in ax.texts:
        text.set_color(_INK if to_hex(text.get_color()) == to_hex(".15") else _CHALK)


def partition(frame: pd.DataFrame, *, ax: Axes | None = None, **axis) -> Axes:
    """Draw one row a member, first on top: the dimensions that it keeps, pale, and those that it discards.

    frame: columns member, start, stop (exclusive), width, all but the first in dimensions.
    """
    ax = ax or plt.gca()
    note(ax, frame)
    ax.barh(frame["member"], frame["width"], height=0.7, color="0.9", label="kept")
    gap = frame["stop"] - frame["start"]
    ax.barh(frame["member"], gap, left=frame["start"], height=0.7, color=RED, label="discarded")
    ax.set(ylim=(frame["member"].max() + 0.6, -0.6), xlim=(0, frame["width"].max()), **axis)
    ax.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    ax.grid(visible=False)
    return ax


_MARKS = {"right": {"edgecolor": GREEN, "linestyle": "-"}, "wrong": {"edgecolor": RED, "linestyle": (0, (2, 1.5))}}


def _without_pictures(ax: Axes) -> Axes:
    """Say in the place of a drawing that there is nothing to draw."""
    ax.text(0.5, 0.5, "no pictures", ha="center", va="center", transform=ax.transAxes, color="0.4")
    ax.set(xticks=[], yticks=[])
    return ax


def picture_rows(frame: pd.DataFrame, ax: Axes | None = None, *, inch: float = 0.95) -> Axes:
    """Draw pictures in rows, those that are marked in a frame: a line where right, dashes where wrong.

    frame: columns row (label), picture ((S, S, 3) uint8), mark ("right", "wrong" or ""), and any that say more of a
    picture.  inch: side of a picture.
    """
    ax = ax or plt.gca()
    if frame.empty:
        return _without_pictures(ax)
    note(ax, frame.drop(columns="picture"))
    rows = dict(list(frame.groupby("row", sort=False)))
    longest = max(map(len, rows.values()))
    for line, part in enumerate(rows.values()):
        for place, (picture, mark) in enumerate(zip(part["picture"], part["mark"])):
            ax.imshow(picture, extent=(place + 0.06, place + 0.94, line + 0.94, line + 0.06), interpolation="none")
            if mark:
                box = plt.Rectangle((place + 0.05, line + 0.05), 0.9, 0.9, fill=False, linewidth=2.4, **_MARKS[mark])
                ax.add_patch(box)
    ax.set(xlim=(0, longest), ylim=(len(rows), 0), xticks=[], aspect="equal")
    ax.set_yticks(np.arange(len(rows)) + 0.5, list(rows))
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.figure.set_size_inches(inch * longest + 1.2, inch * len(rows) + 0.2)
    ax.figure.set_layout_engine("compressed")  # a narrow form leaves no gap below smaller pictures
    return ax


def occlusion_maps(pictures: np.ndarray, maps: np.ndarray, ax: Axes | None = None) -> Axes:
    """Draw pictures (n, S, S, 3) and under each its occlusion map (n, S, S), on one scale of cosine."""
    if not len(maps):
        return _without_pictures(ax or plt.gca())
    limit = np.abs(maps).max() or 1.0
    scale = ScalarMappable(Normalize(-limit, limit), "RdBu_r")
    over = 0.35 * pictures.mean(-1, keepdims=True) + 0.65 * 255 * scale.cmap(scale.norm(maps))[..., :3]
    rows = {"row": np.repeat(["picture", "covered"], len(maps)), "picture": [*pictures, *over.astype(np.uint8)]}
    lost = [np.nan] * len(maps) + maps.max((1, 2)).tolist()
    ax = picture_rows(pd.DataFrame(rows | {"mark": "", "most_cosine_lost": lost}), ax, inch=1.25)
    ax.figure.set_figheight(ax.figure.get_figheight() + 0.8)
    ax.figure.colorbar(scale, ax=ax, label="cosine lost", location="bottom", shrink=0.6, aspect=30)
    return ax


def show_confusion(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the share of val clips of each show (rows) whose nearest train clip is of each show (columns)."""
    ax = ax or plt.gca()
    if table.empty:
        return _without_pictures(ax)
    style = {"cmap": "Blues", "vmin": 0, "vmax": 100, "linewidths": 0.5, "cbar": False, "annot_kws": {"fontsize": 9}}
    note(ax, table.rename_axis("show").reset_index())
    sns.heatmap(100 * table, mask=table == 0, annot=True, fmt=".0f", ax=ax, **style)
    _keep_ink(ax)
    ax.grid(visible=False)
    ax.set(xlabel="show of the nearest train clip", ylabel="show of the val clip")
    ax.tick_params(axis="y", rotation=0)
    return ax
