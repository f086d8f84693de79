import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
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


@pytest.mark.parametrize(
    "low, high, verdict",
    [
        (0.1, 0.2, "gain"),
        (-0.2, -0.1, "loss"),
        (-0.1, 0.1, "open"),
        (0, 0.1, "open"),
        (-0.1, 0, "open"),
        (np.nan, np.nan, "open"),
    ],
)
def test_verdict_is_what_the_interval_supports(low, high, verdict):
    assert figures.signed(low, high, "gain", "loss", "open") == verdict


# -- style ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*AGGREGATORS, *CLASSIFIERS])
def test_every_method_has_its_colour(name):
    to_rgb(figures.COLOURS[name])


def test_panels_stand_side_by_side():
    figure, axes = figures.panels(3)
    assert len(axes) == 3 and len({ax.get_position().y0 for ax in axes}) == 1
    assert len(figures.panels(1)[1]) == 1


# -- drawings ------------------------------------------------------------------------------------------------

FOREST = pd.DataFrame(
    {
        "arm": ["norm", "mean", "quality"],
        "difference": [0.5, 0, 1.0],
        "low": [0.2, np.nan, 0.7],
        "high": [0.9, np.nan, 1.1],
    }
)


def test_forest_puts_the_best_method_on_top():
    ax = figures.forest(FOREST, label="arm", value="difference", xlabel="points")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["mean", "norm", "quality"]
    bars = [bar for bar in ax.containers if isinstance(bar, ErrorbarContainer)]
    assert [(bar[0].get_xdata()[0], bar[0].get_ydata()[0]) for bar in bars] == [(0, 0), (0.5, 1), (1, 2)]


def test_forest_draws_the_intervals_there_are():
    ax = figures.forest(FOREST, label="arm", value="difference", xlabel="points")
    ends = [bar[2][0].get_segments()[0][:, 0].tolist() for bar in ax.containers if bar[2]]
    assert ends == [pytest.approx([0.2, 0.9]), pytest.approx([0.7, 1.1])]


LINES = pd.DataFrame({"range": ["1-4", "5-9"] * 2, "top1": [0.1, 0.2, 0.3, 0.4], "method": ["mean"] * 2 + ["norm"] * 2})


def test_lines_are_drawn_one_a_method_in_the_order_of_the_categories():
    ax = figures.lines(LINES, x="range", y="top1", by="method", xlabel="faces", ylabel="top-1 (share)")
    assert drawn(ax) == {"mean": ([0, 1], [0.1, 0.2]), "norm": ([0, 1], [0.3, 0.4])}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1-4", "5-9"]


def test_lines_of_a_method_without_a_category_leave_its_place_empty():
    ax = figures.lines(LINES.drop(index=2), x="range", y="top1", by="method", xlabel="faces", ylabel="top-1 (share)")
    assert drawn(ax)["norm"] == ([1], [0.4])


def test_lines_drop_no_method_however_many():
    many = pd.DataFrame({"range": "all", "top1": 0.5, "method": [f"arm {i}" for i in range(15)]})
    assert len(drawn(figures.lines(many, x="range", y="top1", by="method", xlabel="faces", ylabel="top-1"))) == 15


def test_lines_can_be_left_unconnected():
    ax = figures.lines(LINES, x="range", y="top1", by="method", xlabel="f", ylabel="t", connect=False)
    assert {line.get_linestyle() for line in ax.get_lines()} == {"None"}


def test_targets_missed_are_told_from_those_met():
    frame = pd.DataFrame({"fact": ["a", "b", "c"], "deviation": [0.5, -1.5, 9.0], "within": [True, False, False]})
    ax = figures.against_target(frame)
    assert drawn(ax) == {"within": ([0.5], [2]), "missed": ([-1.5, 3], [1, 0])}  # beyond 3 at the edge
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]


@pytest.mark.parametrize("log, scale", [(True, "log"), (False, "linear")])
def test_curves_show_the_store_and_the_published_points(log, scale):
    store, published = (pd.DataFrame({"x": x, "y": y}) for x, y in (([1, 2, 3], [1, 0.5, 0.2]), ([2], [0.4])))
    ax = figures.curves(store, published, x="x", y="y", xlabel="faces", ylabel="share", log=log)
    assert drawn(ax) == {"this store": ([1, 2, 3], [1, 0.5, 0.2]), "published": ([2], [0.4])}
    assert ax.get_xscale() == scale


def test_densities_have_area_one_a_group():
    frame = pd.DataFrame({"cosine": np.random.default_rng(0).normal(size=900), "pair": ["one"] * 300 + ["two"] * 600})
    ax = figures.densities(frame, value="cosine", by="pair", xlabel="cosine")
    assert len(ax.patches) == 2
    for patch in ax.patches:
        x, y = patch.get_xy().T
        assert np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) == pytest.approx(1)  # vertical steps add nothing


def test_densities_drop_no_group_however_many():
    frame = pd.DataFrame({"cosine": np.linspace(0, 1, 40), "pair": np.arange(40) % 5})
    assert len(figures.densities(frame, value="cosine", by="pair", xlabel="cosine").patches) == 5


def test_weights_are_drawn_a_clip_a_panel_with_wrong_frames_shaded():
    frame = pd.DataFrame(
        {
            "clip": ["a"] * 4 + ["b"] * 2,
            "frame": [0, 1, 0, 1, 0, 1],
            "weight": [0.2, 0.8, 0.5, 0.5, 1, 0],
            "method": ["norm"] * 2 + ["NAN"] * 2 + ["norm"] * 2,
            "wrong": [False, True, False, True, False, False],
        }
    )
    one, two = figures.frame_weights(frame, figures.panels(2)[1])
    assert drawn(one) == {"norm": ([0, 1], [0.2, 0.8]), "NAN": ([0, 1], [0.5, 0.5])}
    assert drawn(two) == {"norm": ([0, 1], [1, 0])}
    assert [patch.get_x() for patch in one.patches] == [0.5] and len(two.patches) == 0


GRID = pd.DataFrame(
    {
        "share": [0.5, 2.0, 0.5],
        "wrong quality": [-1.0, -1.0, 0.0],
        "difference": [0.4, -0.8, 0.1],
        "low": [0.2, -1.0, -0.1],
        "high": [0.6, -0.6, 0.3],
        "reliability": 0.95,
        "aggregator": "NAN",
    }
)


def grid(frame=GRID):
    return figures.verdict_grid(
        frame,
        x="share",
        y="wrong quality",
        xlabel="share (factor)",
        ylabel="quality",
        limit=1,
        columns=[0.5, 2.0],
        rows=[-1.0, 0.0],
    )


def test_grid_writes_every_difference_into_its_cell():
    texts = {(text.get_position(), text.get_text()) for text in grid().texts}
    assert texts == {((0.5, 0.5), "+0.1"), ((0.5, 1.5), "+0.4"), ((1.5, 1.5), "-0.8")}  # the upper row is quality 0


def test_grid_marks_the_cells_whose_interval_excludes_zero():
    dots = {(int(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in grid().get_lines()}
    assert dots == {(0, 1), (1, 1)}


def test_grid_colours_tell_gains_from_losses():
    mesh = grid().collections[0]
    mesh.update_scalarmappable()
    (red, _, blue), (loss_red, _, loss_blue) = (mesh.get_facecolors()[i][:3] for i in (2, 3))
    assert blue > red and loss_red > loss_blue


def test_grids_have_a_panel_for_every_arm_and_reliability():
    frame = pd.concat(
        [GRID.assign(reliability=r, aggregator=a) for r in (0.6, 0.8, 0.95) for a in ("NAN", "attention")]
    )
    assert len(figures.verdict_grids(frame).axes) == 6


def test_grids_of_nothing_can_be_drawn():
    assert len(figures.verdict_grids(GRID[:0]).axes) == 1


def test_late_hits_have_a_line_for_every_number_of_clips():
    frame = pd.DataFrame({"relevant": [1, 1, 5, 5], "rank": [1, 10, 1, 10], "loss": [0.5, 0.1, 0.2, 0.01]})
    ax = figures.late_hits(frame)
    assert drawn(ax) == {"1": ([1, 10], [0.5, 0.1]), "5": ([1, 10], [0.2, 0.01])}
    assert ax.get_xscale() == "log"


def test_interval_width_stands_beside_its_normal_approximation():
    frame = pd.DataFrame({"identities": [100, 10], "width": [0.02, 0.07], "normal": [0.021, 0.066]})
    assert drawn(figures.interval_width(frame)) == {
        "bootstrap": ([100, 10], [0.02, 0.07]),
        "normal approximation": ([10, 100], [0.066, 0.021]),
    }


def test_intervals_without_a_width_are_drawn_without_a_warning(recwarn):
    frame = pd.DataFrame({"identities": [100, 10], "width": [0.0, 0.0], "normal": [0.0, 0.0]})
    assert drawn(figures.interval_width(frame))["bootstrap"] == ([100, 10], [0, 0]) and not recwarn.list


def test_paired_and_unpaired_intervals_stand_beside_each_other():
    frame = pd.DataFrame(
        {
            "seed": [4, 4, 2, 2],
            "kind": ["paired", "unpaired"] * 2,
            "difference": [0.1, 0.1, 0.3, 0.3],
            "low": [0.05, -0.1, 0.2, 0.1],
            "high": [0.15, 0.3, 0.4, 0.5],
        }
    )
    ax = figures.paired_intervals(frame)
    paired, unpaired = (bar[2][0].get_segments() for bar in ax.containers)
    assert [part[:, 1].tolist() for part in paired] == [pytest.approx([0.05, 0.15]), pytest.approx([0.2, 0.4])]
    assert [part[:, 1].tolist() for part in unpaired] == [pytest.approx([-0.1, 0.3]), pytest.approx([0.1, 0.5])]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "4"]
    assert paired[0][0, 0] < unpaired[0][0, 0]


def one_point(**columns):
    return pd.DataFrame({name: [value] for name, value in columns.items()})


DRAWINGS = {
    "forest": lambda ax: figures.forest(FOREST, label="arm", value="difference", xlabel="points of MAP@100", ax=ax),
    "lines": lambda ax: figures.lines(LINES, x="range", y="top1", by="method", xlabel="faces", ylabel="share", ax=ax),
    "against_target": lambda ax: figures.against_target(one_point(fact="a", deviation=0.1, within=True), ax),
    "curves": lambda ax: figures.curves(
        one_point(x=1, y=2), one_point(x=1, y=2), x="x", y="y", xlabel="faces", ylabel="share", ax=ax
    ),
    "densities": lambda ax: figures.densities(
        pd.DataFrame({"v": [0, 1.0], "by": "a"}), value="v", by="by", xlabel="cosine", ax=ax
    ),
    "verdict_grid": lambda ax: figures.verdict_grid(
        GRID,
        x="share",
        y="wrong quality",
        xlabel="share (factor)",
        limit=1,
        ylabel="quality",
        columns=[0.5, 2.0],
        rows=[-1.0, 0.0],
        ax=ax,
    ),
    "late_hits": lambda ax: figures.late_hits(one_point(relevant=1, rank=2, loss=0.5), ax),
    "interval_width": lambda ax: figures.interval_width(one_point(identities=9, width=0.1, normal=0.1), ax),
    "paired_intervals": lambda ax: figures.paired_intervals(
        one_point(seed=0, kind="paired", difference=0.1, low=0, high=0.2), ax
    ),
    "sweep": lambda ax: figures.sweep(
        one_point(width=32, y=0.1, low=0, high=0.2), x="width", y="y", xlabel="dimensions", ylabel="points", ax=ax
    ),
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


def test_dodged_marks_stand_in_rows_from_the_top_each_with_its_interval():
    frame = pd.DataFrame(
        {
            "step": ["a", "b", "a"],
            "kind": ["one", "one", "two"],
            "gain": [1.0, 2.0, 3.0],
            "low": [0.5, 1.0, np.nan],
            "high": [2.0, 2.5, np.nan],
        }
    )
    ax = figures.dodged(frame, label="step", value="gain", by="kind", xlabel="points", ax=plt.subplots()[1])
    one, two = (container.lines for container in ax.containers)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert one[0].get_xdata().tolist() == [1, 2] and two[0].get_xdata().tolist() == [3]
    assert one[0].get_ydata().tolist() == pytest.approx([0.25, -0.75])
    assert two[0].get_ydata().tolist() == pytest.approx([-0.25])
    assert [part[:, 0].tolist() for part in one[2][0].get_segments()] == [[0.5, 2.0], [1.0, 2.5]]
    assert two[2][0].get_segments()[0][:, 0].tolist() == [3, 3]  # no interval is known
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    assert (ax.get_title(), ax.get_xlabel()) == ("", "points")


PARTITION = pd.DataFrame({"member": [0, 1], "start": [0, 4], "stop": [4, 8], "width": [32, 32]})
GAINS = pd.DataFrame(
    {
        "members": [1, 2, 1, 2],
        "kind": ["seeds", "seeds", "views", "views"],
        "difference": [0.0, 0.2, -0.1, 0.4],
        "low": [0.0, 0.1, -0.3, np.nan],
        "high": [0.0, 0.3, 0.1, np.nan],
    }
)


def test_partition_shows_the_discarded_block_of_every_member_first_on_top():
    ax = figures.partition(PARTITION, xlabel="dimension")
    kept, gone = ax.containers
    assert [(bar.get_x(), bar.get_width()) for bar in kept] == [(0, 32), (0, 32)]
    assert [(bar.get_x(), bar.get_width()) for bar in gone] == [(0, 4), (4, 4)]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("", "dimension", "member")


def test_gains_have_their_intervals_and_stand_beside_each_other():
    elsewhere, ax = plt.subplots()[1], plt.subplots()[1]
    plt.sca(elsewhere)
    assert figures.gains(GAINS, x="members", by="kind", xlabel="members", ylabel="points", ax=ax) is ax
    assert not elsewhere.has_data() and ax.get_title() == ""
    seeds, views = (bar for bar in ax.containers if isinstance(bar, ErrorbarContainer))
    assert seeds[0].get_ydata().tolist() == [0, 0.2]
    assert [part[:, 1].tolist() for part in seeds[2][0].get_segments()] == [[0, 0], pytest.approx([0.1, 0.3])]
    assert (seeds[0].get_xdata() < views[0].get_xdata()).all()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2"]
    assert ax.get_xscale() == "log"


# -- traces --------------------------------------------------------------------------------------------------

TRACED = pd.DataFrame(
    {
        "p": [0.0, 0.1, 1.0] * 2,
        "gain": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "low": [0.5, np.nan, 2.0, 4.0, 4.0, 4.0],
        "high": [2.0, np.nan, 3.0, 4.0, 6.0, 9.0],
        "arm": ["one"] * 3 + ["two"] * 3,
    }
)


def traced(frame=TRACED, **options):
    ax = plt.subplots()[1]
    return figures.traces(frame, x="p", y="gain", by="arm", xlabel="p", ylabel="gain", ax=ax, **options)


def test_traces_stand_at_their_quantity():
    ax = traced()
    assert drawn(ax) == {"one": ([0, 0.1, 1], [1, 2, 3]), "two": ([0, 0.1, 1], [4, 5, 6])}
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("p", "gain", "")


def test_traces_stand_apart_by_the_dodge():
    assert [x for x, _ in drawn(traced(dodge=0.1)).values()] == [
        pytest.approx([-0.05, 0.05, 0.95]),
        pytest.approx([0.05, 0.15, 1.05]),
    ]


def test_bars_of_traces_reach_from_low_to_high_and_are_left_out_where_they_are_not_known():
    ax = traced(low="low", high="high")
    bars = [
        [segment[:, 1].tolist() for segment in container.lines[2][0].get_segments()]
        for container in ax.containers
        if isinstance(container, ErrorbarContainer)
    ]
    assert bars == [[[0.5, 2], [2, 3]], [[4, 4], [4, 6], [4, 9]]]


@pytest.mark.parametrize(
    "frame, legend, drawn_legend",
    [
        (TRACED, "best", True),
        (TRACED, "outside", True),
        (TRACED, "none", False),
        (TRACED[:3], "best", False),
        (TRACED[:0], "best", False),
    ],
)
def test_traces_have_a_legend_where_there_is_something_to_tell_apart(frame, legend, drawn_legend):
    assert (traced(frame, legend=legend).get_legend() is not None) == drawn_legend


SWEEP = pd.DataFrame(
    {"weight": [0.0, 0.1, 0.5], "difference": [0.0, 2.0, -1.0], "low": [np.nan, 1.0, -4.0], "high": [np.nan, 4.0, 0.0]}
)


def test_sweep_draws_intervals_where_there_are_some_and_a_line_a_seed():
    each = pd.DataFrame({"seed": [3, 4, 3, 4, 3], "weight": [0, 0, 0.5, 0.5, 1.0], "difference": [0, 0, 7, 8, 9.0]})
    ax = figures.sweep(
        SWEEP, x="weight", y="difference", xlabel="weight", ylabel="points", each=each, ax=plt.subplots()[1]
    )
    (bars,) = ax.collections
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [[0, 0], [1, 4], [-4, 0]]
    seeds = [list(zip(*line.get_data())) for line in ax.lines[:2]]
    assert seeds == [[(0, 0), (2, 7)], [(0, 0), (2, 8)]]  # a weight that the frame leaves out is not drawn
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "0.1", "0.5"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("weight", "points")
