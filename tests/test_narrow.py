import itertools

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from test_figures import DODGED, FOREST, TRACED, traced

from mmlib import figures
from mmlib.narrow import LOW, LOWEST, NARROW, narrowed


@pytest.fixture(autouse=True)
def styled():
    plt.switch_backend("Agg")
    with plt.rc_context():
        figures.set_style()
        yield
    plt.close("all")


def laid_out(figure):
    small = narrowed(figure)
    small.draw_without_rendering()
    return small


def drawn_width(figure):
    """Width, in inches, of what is drawn, with what stands outside of the figure."""
    return figure.get_tightbbox().width


def words(texts):
    return [text.get_text() for text in texts if text.get_visible()]


def test_panels_stand_below_each_other_each_with_its_labels_and_the_figure_stays_as_it_is():
    figure, axes = figures.panels(3, sharey=True)
    for ax in axes:
        figures.traces(
            TRACED, x="p", y="gain", by="arm", ax=ax, xlabel="share", ylabel="" if ax.get_subplotspec().num1 else "gain"
        )
    size, small = figure.get_size_inches().tolist(), laid_out(figure)
    assert drawn_width(small) < NARROW + 0.3 and small.get_figheight() > 2 * LOW
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in small.axes] == [("share", "gain")] * 3
    assert all("4" in words(ax.get_yticklabels()) for ax in small.axes)  # a tick of a shared axis
    assert sorted(-ax.get_position().y0 for ax in small.axes) == [-ax.get_position().y0 for ax in small.axes]
    assert figure.get_size_inches().tolist() == size and plt.get_fignums() == [figure.number]


def test_labels_of_stacked_panels_do_not_run_into_each_other():
    figure, axes = figures.panels(2, sharey=True)
    for ax in axes:
        traced(ax=ax, xlabel="share")
    axes[0].set_ylabel("gain over the plain mean (points of precision)")
    assert not overlaps(ax.yaxis.label for ax in laid_out(figure).axes)


def test_a_legend_is_no_wider_than_the_drawing():
    names = TRACED.assign(arm=["a method with a long name"] * 3 + ["another one with a name as long"] * 3)
    assert drawn_width(laid_out(traced(names, legend="above").figure)) < NARROW + 0.3


def test_labels_of_rows_break():
    names = ["a fact whose name is much too long for it and longer than a row", "b"]
    facts = pd.DataFrame({"fact": names, "deviation": [0.5, 2], "within": [True, False]})
    ax = figures.against_target(facts, ax=figures.panels(1, width=6.2)[1][0])
    small = laid_out(ax.figure)
    assert drawn_width(small) < NARROW + 0.3
    assert names[0] not in words(small.axes[0].texts) and names[0] in words(ax.get_yticklabels())


def share(ax):
    """Width of axes as a share of the drawing's, and their height in inches."""
    box = ax.get_window_extent()
    return box.width / ax.figure.bbox.width, box.height / ax.figure.dpi


def overlaps(texts):
    boxes = [text.get_window_extent() for text in texts if text.get_text().strip() and text.get_visible()]
    return [(one, other) for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]


@pytest.mark.parametrize("by", ["", "kind"])
def test_rows_of_a_forest_have_their_label_above_their_marks_and_the_width_for_these(by):
    steps = ["the attention of the released code beats quality weights", "a down-weighted claim with a long name"]
    frame = DODGED.assign(step=[steps[0], steps[1], steps[0]]) if by else DODGED[:2].assign(step=steps)
    ax = figures.forest(frame, label="step", value="gain", by=by, xlabel="points", ax=plt.figure().gca())
    wide = [label.get_text() for label in ax.get_yticklabels()]
    (narrow,) = laid_out(ax.figure).axes
    assert share(narrow)[0] > 0.7
    assert not overlaps(narrow.get_xticklabels()) and not overlaps(narrow.texts)
    labels = {text.get_text(): text.get_window_extent() for text in narrow.texts if text.get_text() in steps}
    assert set(labels) == set(steps)
    for line in (box.lines[0] for box in narrow.containers):
        for _, y in narrow.transData.transform(line.get_xydata()):
            assert not any(box.y0 < y < box.y1 for box in labels.values())
    assert not any(label.label1.get_visible() for label in narrow.yaxis.get_major_ticks())
    assert wide == [label.get_text() for label in ax.get_yticklabels()] and not ax.texts  # the other stays as it is


@pytest.mark.parametrize("legend", ["axes", "text", "figure", "above"])
def test_a_legend_stands_above_what_is_drawn_in_columns_that_fit(legend):
    names = pd.concat([TRACED.assign(arm=TRACED["arm"] + f" of many lines, {n}") for n in range(3)])
    ax = traced(names, legend="above" if legend == "above" else "none")
    if legend in ("axes", "text"):
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    if legend == "text":
        ax.text(0.01, 1.02, "a processor", transform=ax.transAxes)
    if legend == "figure":
        ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure = laid_out(ax.figure)
    (narrow,) = figure.axes
    box = (narrow.get_legend() or figure.legends[0]).get_window_extent()
    wide, high = share(narrow)
    assert wide > 0.55 and high > LOWEST - 0.05
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1 and narrow.bbox.y1 <= box.y0 < box.y1 <= figure.bbox.y1
    assert not any(text.get_window_extent().overlaps(box) for text in narrow.texts if text.get_text().strip())


def test_a_panel_is_high_enough_whatever_its_ticks():
    names = TRACED.assign(p=["a category with a long name", "aggregation and the loss", "another"] * 2)
    figure, (ax,) = figures.panels(1, height=2.0)
    figures.traces(names, x="p", y="gain", by="arm", scale="categories", legend="above", ax=ax)
    wide, high = share(laid_out(figure).axes[0])
    assert wide > 0.55 and high > LOWEST - 0.05


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: figures.forest(FOREST[:0], label="arm", value="difference", ax=ax),
        lambda ax: figures.show_confusion(pd.DataFrame(), ax),
        lambda ax: ax.barh([0, 1], [1, 2], tick_label=["a bar with a long name", "another"]),
        lambda ax: ax.plot([0, 1], [0.5, 1.4]) and ax.set_yticks([0, 1], ["a level with a long name", "another"]),
    ],
)
def test_what_has_no_rows_of_marks_is_made_narrow_too(draw):
    ax = plt.figure().gca()
    draw(ax)
    assert share(laid_out(ax.figure).axes[0])[1] > LOWEST - 0.05


def test_powers_at_a_tick_are_no_long_words():
    ax = traced(TRACED.assign(p=[1, 10, 100] * 2), xscale="log", xlabel="rank\nof it")
    (narrow,) = laid_out(ax.figure).axes
    assert {label.get_rotation() for label in narrow.get_xticklabels()} == {0} and narrow.get_xlabel() == "rank\nof it"


def test_ticks_do_not_run_into_each_other():
    rows = FOREST.assign(arm=["a long name of an arm, " + name for name in "abc"])
    (small,) = laid_out(figures.forest(rows, label="arm", value="difference", ax=plt.figure().gca()).figure).axes
    assert not overlaps(small.get_xticklabels()) and len(small.get_xticks()) <= 6
    ax = traced(TRACED.assign(p=["baseline", "aggregation and loss", "scene"] * 2), scale="categories")
    ax.set_xlabel("a label that is longer than what a narrow drawing has room for")
    (small,) = laid_out(ax.figure).axes
    assert "\n" in small.get_xlabel() and {label.get_rotation() for label in small.get_xticklabels()} == {60}


def test_letters_among_marks_have_a_class_that_the_page_sets_off_from_them():
    frame = DODGED[:2].assign(
        step=["the attention of the released code beats quality weights", "a claim with a long name"]
    )
    drawn = figures.drawing(
        figures.forest(frame, label="step", value="gain", xlabel="points", ax=plt.figure().gca()).figure
    )
    assert drawn.count("&lt;g class=&quot;inside&quot;&gt;") == len(frame) and '<g class="inside">' not in drawn
