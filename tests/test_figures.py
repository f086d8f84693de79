import html
import io
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.container import ErrorbarContainer

from mmlib import figures
from mmlib.aggregate import AGGREGATORS
from mmlib.experiment import CLASSIFIERS


@pytest.fixture(autouse=True)
def closed():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


@pytest.fixture
def shown(monkeypatch):
    """Collect what would be displayed: (mime bundle, options)."""
    calls = []
    monkeypatch.setattr(figures, "display", lambda data, **options: calls.append((data, options)))
    return calls


def drawn(ax):
    """Lines with more than one point or with markers, without reference lines: (x, y) of each by label."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in ax.get_lines()
        if not line.get_label().startswith("_")
    }


# -- prose ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, text",
    [(3, "3"), (0.25, "0.25"), ("yes", "'yes'"), (np.float32(0.5), "0.5"), (np.int64(7), "7"), (float("nan"), "nan")],
)
def test_glue_leaves_a_record_that_the_book_can_paste(shown, value, text):
    figures.glue("share", value)
    data, options = shown[0]
    assert data == {"application/papermill.record/text/plain": text}
    assert options == {
        "raw": True,
        "metadata": {"scrapbook": {"name": "share", "mime_prefix": "application/papermill.record/"}},
    }


@pytest.mark.parametrize("simulated, said", [(True, "simulated clips"), (False, "data set of the reader's own")])
def test_notice_says_where_the_numbers_come_from(shown, simulated, said):
    figures.notice(simulated)
    data, options = shown[0]
    assert said in data["application/papermill.record/text/html"]
    assert options["metadata"]["scrapbook"]["name"] == "notice"


def test_notice_cannot_break_the_page(shown):
    figures.notice(False, "<script> & more")
    assert "&lt;script&gt; &amp; more" in shown[0][0]["application/papermill.record/text/html"]


def test_a_drawing_has_the_ink_of_the_page_and_says_what_it_shows(shown):
    figures.set_style()
    for _ in range(2):
        figure, ax = plt.subplots()
        ax.set_xlabel("gain <in points>")
        figures.glue_drawing("picture", figure, 'a row a claim, "adds" & more')
    first, second = (data["application/papermill.record/text/html"] for data, _ in shown)
    assert first == second and not plt.get_fignums()
    assert 'role="img" aria-label="a row a claim, &quot;adds&quot; &amp; more"' in first
    assert "gain &lt;in points&gt;" in first  # letters, not outlines
    assert "currentColor" in first and "rgb(128 128 128 / .3)" in first  # letters, and the grid
    assert to_hex(".15") not in first and to_hex("0.9") not in first
    assert first.count("<svg role=") == first.count("</svg") == 2 and "metadata" not in first  # wide and narrow


def test_what_can_be_touched_has_its_table_and_a_sentence_for_readers_without_scripts():
    frame = pd.DataFrame({"arm": ["</script><!-- NAN"], "gain": [1 / 3], "wrong": [True], "low": [np.nan]})
    frame.attrs["made"] = "Two <old> records."
    said = figures.touch("grid", frame, label='a "world"', instead="See <above>.").data
    assert said.count("<script") == said.count("</script") == 1 and "<!--" not in said
    table = json.loads(re.search(r'<script type="application/json">(.*?)</script>', said)[1])
    assert table == {"columns": [*frame], "data": [["</script><!-- NAN", 0.3333, True, None]]}
    assert 'data-kind="grid" role="group" aria-label="a &quot;world&quot;"' in said
    assert '<p class="instead">See &lt;above&gt;.</p><p class="source">Two &lt;old&gt; records.</p>' in said


def test_there_is_nothing_to_touch_of_an_empty_table():
    assert figures.touch("grid", pd.DataFrame({"arm": []}), label="a", instead="b") is None


def metadata(figure):
    found = re.findall(r'<metadata class="(\w+)">(.*?)</metadata>', figures.drawing(figure), re.DOTALL)
    return {kind: html.unescape(text) for kind, text in found}


def test_a_drawing_has_what_it_was_drawn_from_and_who_made_that():
    figure, axes = figures.panels(2)
    frame = FOREST.rename(columns={"arm": 'arm & "more"'})
    frame.attrs["made"] = "Two <old> records."
    frame.loc[0, 'arm & "more"'] = r"a \d back-slash"
    figures.forest(frame, label='arm & "more"', value="difference", ax=axes[0])
    figures.traces(TRACED.assign(gain=1 / 3), x="p", y="gain", by="arm", ax=axes[1])
    said = metadata(figure)
    table = pd.read_csv(io.StringIO(said["data"]))
    assert table["panel"].tolist() == [1] * 3 + [2] * 6
    assert table['arm & "more"'].tolist()[:3] == ["quality", r"a \d back-slash", "mean"]
    assert table["gain"].tolist()[3:] == [0.333333] * 6
    assert said["made"] == "Two <old> records. Computed when this page was built."


def test_a_row_of_a_forest_says_its_value_where_the_pointer_rests():
    figures.forest(FOREST, label="arm", value="difference", ax=plt.subplots()[1])
    drawn = figures.drawing(plt.gcf())
    assert "<title>quality: +1.00 [+0.70, +1.10]</title>" in drawn and "<title>mean: the reference</title>" in drawn


def test_black_follows_the_page_and_ids_without_a_use_are_left_out():
    figure, ax = plt.subplots()
    ax.plot([0, 1], [0, 1], "o", color=figures.BLACK)
    drawn = figures.drawing(figure)
    assert drawn.startswith('<svg class="wide"') and 'fill="currentColor"' in drawn[:200] and "#000000" not in drawn
    assert 'id="axes_1"' not in drawn and re.search(r'<path id="m\w+"', drawn)


def test_letters_of_a_heat_map_stay_dark_on_a_dark_page():
    drawn = figures.drawing(figures.verdict_grids(GRID.assign(difference=[0.4, -8.0, 0.1])))
    assert (
        drawn.count(f"fill: {figures._INK}") >= 2 and drawn.count(f"fill: {figures._CHALK}") == 2
    )  # of a number a cell, wide and narrow


def test_nothing_is_said_to_be_drawn_from_what_is_not_drawn_by_us():
    assert set(metadata(plt.subplots()[0])) == {"narrow"}


def test_a_negative_number_in_a_drawing_has_a_minus():
    drawn = figures.drawing(figures.verdict_grids(GRID.assign(difference=[0.4, -8.0, 0.1])))
    assert ">−8.0</text>" in drawn and "&gt;−8.0&lt;/text" in drawn and ">-8.0" not in drawn


def test_a_drawing_says_over_what_its_intervals_are():
    figures.forest(FOREST.assign(n=[10, NAN, 10.0], interval="worlds"), label="arm", value="difference")
    assert metadata(plt.gcf())["made"] == "Computed when this page was built. Intervals over 10 worlds."


# -- style ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*AGGREGATORS, *CLASSIFIERS])
def test_every_method_has_its_colour(name):
    to_rgb(figures.COLOURS[name])


def test_panels_stand_side_by_side():
    figure, axes = figures.panels(3)
    assert len(axes) == 3 and len({ax.get_position().y0 for ax in axes}) == 1
    assert len(figures.panels(1)[1]) == 1


# -- drawings ------------------------------------------------------------------------------------------------

NAN = np.nan
FOREST = pd.DataFrame({"arm": ["norm", "mean", "quality"], "difference": [0.5, 0, 1.0]})
FOREST = FOREST.assign(low=[0.2, NAN, 0.7], high=[0.9, NAN, 1.1])
DODGED = pd.DataFrame({"step": ["a", "b", "a"], "kind": ["one", "one", "two"], "gain": [1.0, 2.0, 3.0]})
DODGED = DODGED.assign(low=[0.5, 1.0, NAN], high=[2.0, 2.5, NAN])
TRACED = pd.DataFrame({"p": [0.0, 0.1, 1.0] * 2, "gain": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]})
TRACED = TRACED.assign(low=[0.5, NAN, 2.0, 4.0, 4.0, 4.0], high=[2.0, NAN, 3.0, 4.0, 6.0, 9.0])
TRACED = TRACED.assign(arm=["one"] * 3 + ["two"] * 3)
GRID = pd.DataFrame({"share": [0.5, 2.0, 0.5], "wrong quality": [-1.0, -1.0, 0.0], "difference": [0.4, -0.8, 0.1]})
GRID = GRID.assign(low=[0.2, -1.0, -0.1], high=[0.6, -0.6, 0.3], reliability=0.95, aggregator="NAN")


def traced(frame=TRACED, **options):
    return figures.traces(frame, **{"x": "p", "y": "gain", "by": "arm", "ax": plt.subplots()[1]} | options)


def bars(ax, axis):
    """Ends of the bars of every container, along x (0) or y (1); none where there is no interval."""
    drawn = [box.lines[2][0].get_segments() for box in ax.containers if isinstance(box, ErrorbarContainer)]
    return [[part[:, axis].tolist() for part in parts if np.ptp(part[:, axis])] for parts in drawn]


def test_forest_takes_the_colours_of_its_rows():
    ax = figures.forest(FOREST, label="arm", value="difference", colours=dict.fromkeys(FOREST["arm"], figures.RED))
    marks = [line for line in ax.get_lines() if line.get_marker() == "o"]
    assert marks and {line.get_color() for line in marks} == {figures.RED}


def test_forest_puts_the_best_method_on_top_with_the_intervals_there_are():
    ax = figures.forest(FOREST, label="arm", value="difference", xlabel="points")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["quality", "norm", "mean"]
    assert list(ax.get_yticks()) == [0, -1, -2]
    places = {box.lines[0].get_ydata()[0]: box.lines[0].get_xdata()[0] for box in ax.containers}
    assert places == {0: 1.0, -1: 0.5, -2: 0.0}
    assert bars(ax, 0) == [[pytest.approx([0.7, 1.1])], [pytest.approx([0.2, 0.9])], []]


def test_marks_of_a_row_stand_beside_each_other_rows_in_the_order_of_the_frame():
    ax = figures.forest(DODGED, label="step", value="gain", by="kind", xlabel="points", ax=plt.subplots()[1])
    one, two = (container.lines[0] for container in ax.containers)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert one.get_xdata().tolist() == [1, 2] and two.get_xdata().tolist() == [3]
    assert one.get_ydata().tolist() == pytest.approx([0.25, -0.75]) and two.get_ydata().tolist() == [-0.25]
    assert bars(ax, 0) == [[[0.5, 2.0], [1.0, 2.5]], []]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]


def test_traces_stand_at_their_quantity():
    ax = traced(xlabel="p", ylabel="gain")
    assert drawn(ax) == {"one": ([0, 0.1, 1], [1, 2, 3]), "two": ([0, 0.1, 1], [4, 5, 6])}
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("p", "gain", "")


def test_traces_over_categories_stand_in_the_order_of_the_frame_and_leave_places_empty():
    ax = traced(TRACED.drop(index=3), scale="categories")
    assert drawn(ax) == {"one": ([0, 1, 2], [1, 2, 3]), "two": ([1, 2], [5, 6])}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "0.1", "1"]


@pytest.mark.parametrize("scale, apart", [("linear", [1, 1.5]), ("doubling", [1, 2**0.5])])
def test_traces_stand_apart_by_the_dodge(scale, apart):
    frame = pd.DataFrame({"p": [1, 1], "gain": [1, 2], "arm": ["one", "two"]})
    first, second = (x[0] for x, _ in drawn(traced(frame, dodge=0.5, scale=scale)).values())
    assert second - first == pytest.approx(apart[1] - apart[0], rel=0.2) and first < 1 < second


def test_bars_of_traces_reach_from_low_to_high_and_are_left_out_where_they_are_not_known():
    assert bars(traced(bars=True), 1) == [[[0.5, 2], [2, 3]], [[4, 6], [4, 9]]]


def test_no_method_is_dropped_however_many():
    many = pd.DataFrame({"p": 0.5, "gain": 0.5, "arm": [f"arm {i}" for i in range(15)]})
    assert len(drawn(traced(many))) == 15
    assert len(figures.densities(many.assign(p=range(15)), value="p", by="arm").patches) == 15


def test_counts_have_whole_ticks():
    few = pd.DataFrame({"epoch": [0, 1, 2, 3], "loss": [4.0, 3.0, 2.0, 1.0]})
    members = pd.DataFrame({"member": range(4), "start": range(4), "stop": range(1, 5), "width": 8})
    traced = figures.traces(few, x="epoch", y="loss", ax=plt.subplots()[1])
    for ticks in (traced.get_xticks(), figures.partition(members, ax=plt.subplots()[1]).get_yticks()):
        assert len(ticks) > 2 and (ticks == np.round(ticks)).all()
    assert not (
        figures.traces(few.astype(float), x="epoch", y="loss", ax=plt.subplots()[1]).get_xticks() % 1 == 0
    ).all()


def test_ranks_on_a_logarithmic_axis_are_plain_numbers():
    ax = traced(TRACED.assign(p=[1, 10, 100] * 2), scale="log")
    ax.figure.canvas.draw()
    assert {"1", "10", "100"} <= {label.get_text() for label in ax.get_xticklabels()}


def test_traces_can_be_left_unconnected():
    assert {line.get_linestyle() for line in traced(line={"linestyle": "none"}).get_lines()} == {"None"}


LEGENDS = [(TRACED, "best", True), (TRACED, "above", True), (TRACED, "none", False), (TRACED[:3], "best", False)]


@pytest.mark.parametrize("frame, legend, there", [*LEGENDS, (TRACED[:0], "best", False)])
def test_traces_have_a_legend_where_there_is_something_to_tell_apart(frame, legend, there):
    assert (traced(frame, legend=legend).get_legend() is not None) == there


@pytest.mark.parametrize("top, scale", [(5.0, "log"), (0.0, "linear")])
def test_axis_is_logarithmic_where_it_has_a_positive_value(recwarn, top, scale):
    ax = figures.plain_log(traced(TRACED.assign(gain=top)), "y")
    ax.figure.canvas.draw()
    assert ax.get_yscale() == scale and not recwarn.list


def test_targets_missed_are_told_from_those_met():
    frame = pd.DataFrame({"fact": ["a", "b", "c"], "deviation": [0.5, -1.5, 9.0], "within": [True, False, False]})
    ax = figures.against_target(frame)
    assert drawn(ax) == {"within": ([0.5], [0]), "missed": ([-1.5, 3], [-1, -2])}  # beyond 3 at the edge
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]


def test_curves_show_the_store_and_the_published_points():
    store, published = (pd.DataFrame({"x": x, "y": y}) for x, y in (([1, 2, 3], [1, 0.5, 0.2]), ([2], [0.4])))
    ax = figures.curves({"this store": store, "published": published}, x="x", y="y", xscale="log")
    assert drawn(ax) == {"this store": ([1, 2, 3], [1, 0.5, 0.2]), "published": ([2], [0.4])}
    assert ax.get_xscale() == "log"


def test_densities_have_area_one_a_group():
    frame = pd.DataFrame({"cosine": np.random.default_rng(0).normal(size=900), "pair": ["one"] * 300 + ["two"] * 600})
    ax = figures.densities(frame, value="cosine", by="pair", xlabel="cosine")
    assert len(ax.patches) == 2
    for patch in ax.patches:
        x, y = patch.get_xy().T
        assert np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) == pytest.approx(1)  # vertical steps add nothing


def test_weights_are_drawn_a_clip_a_panel_with_wrong_frames_shaded():
    frame = pd.DataFrame({"clip": ["a"] * 4 + ["b"] * 2, "frame": [0, 1] * 3, "weight": [0.2, 0.8, 0.5, 0.5, 1, 0]})
    frame = frame.assign(method=["norm"] * 2 + ["NAN"] * 2 + ["norm"] * 2, wrong=[False, True] * 2 + [False] * 2)
    one, two = figures.frame_weights(frame, figures.panels(2)[1])
    assert drawn(one) == {"norm": ([0, 1], [0.2, 0.8]), "NAN": ([0, 1], [0.5, 0.5])}
    assert drawn(two) == {"norm": ([0, 1], [1, 0])}
    assert [patch.get_x() for patch in one.patches] == [0.5] and len(two.patches) == 0


def test_grid_writes_every_difference_into_its_cell_and_marks_those_told_from_zero():
    (ax,) = figures.verdict_grids(GRID).axes
    texts = {(text.get_position(), text.get_text()) for text in ax.texts if text.get_text()[0] in "+-"}
    assert texts == {((0.5, 0.5), "+0.1"), ((0.5, 1.5), "+0.4"), ((1.5, 1.5), "-0.8")}  # the upper row is quality 0
    assert {(int(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in ax.get_lines()} == {(0, 1), (1, 1)}


def test_grid_colours_tell_gains_from_losses():
    mesh = figures.verdict_grids(GRID).axes[0].collections[0]
    mesh.update_scalarmappable()
    (red, _, blue), (loss_red, _, loss_blue) = (mesh.get_facecolors()[i][:3] for i in (2, 3))
    assert blue > red and loss_red > loss_blue


def test_a_panel_of_a_grid_has_its_arm_and_reliability_above_it():
    frame = pd.concat([GRID.assign(reliability=r, aggregator=a) for a in ("NAN", "attention") for r in (0.6, 0.8)])
    said = [ax.texts[-1].get_text() for ax in figures.verdict_grids(frame).axes]
    assert said == [f"{arm}, reliability {r}" for arm in ("NAN", "attention") for r in (0.6, 0.8)]


def test_grids_have_a_panel_for_every_arm_and_reliability():
    frame = pd.concat([GRID.assign(reliability=r, aggregator=a) for r in (0.6, 0.8) for a in ("NAN", "attention")])
    assert len(figures.verdict_grids(frame).axes) == 4 and len(figures.verdict_grids(GRID[:0]).axes) == 1


def test_partition_shows_the_discarded_block_of_every_member_first_on_top():
    frame = pd.DataFrame({"member": [0, 1], "start": [0, 4], "stop": [4, 8], "width": [32, 32]})
    ax = figures.partition(frame, xlabel="dimension")
    kept, gone = ax.containers
    assert [(bar.get_x(), bar.get_width()) for bar in kept] == [(0, 32), (0, 32)]
    assert [(bar.get_x(), bar.get_width()) for bar in gone] == [(0, 4), (4, 4)]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]


ONE = pd.DataFrame({"fact": ["a"], "deviation": [0.1], "within": [True], "x": [1], "y": [2]})
DRAWINGS = {
    "forest": lambda ax: figures.forest(FOREST, label="arm", value="difference", xlabel="points", ax=ax),
    "traces": lambda ax: figures.traces(TRACED, x="p", y="gain", by="arm", xlabel="p", ylabel="gain", ax=ax),
    "against_target": lambda ax: figures.against_target(ONE, ax),
    "curves": lambda ax: figures.curves(
        {"one": ONE, "other": ONE}, x="x", y="y", xlabel="faces", ylabel="share", ax=ax
    ),
    "densities": lambda ax: figures.densities(TRACED, value="gain", by="arm", xlabel="gain", ax=ax),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawing_returns_its_axes_labelled_and_without_a_title(name):
    elsewhere, ax = plt.subplots()[1], plt.subplots()[1]
    plt.sca(elsewhere)
    assert DRAWINGS[name](ax) is ax
    assert not elsewhere.has_data()
    assert ax.get_title() == "" and ax.get_xlabel() != ""
    assert ax.get_ylabel() != "" or [label.get_text() for label in ax.get_yticklabels()] != []


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawing_without_axes_takes_the_current_ones(name):
    ax = plt.subplots()[1]
    assert DRAWINGS[name](None) is ax and ax.has_data()
