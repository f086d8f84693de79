import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from benchmarks import cost, drawing, growth, prediction
from mmlib import figures

MACHINE = {
    "cpu": "A",
    "cores": 2,
    "memory": 10e9,
    "gpu": None,
    "gpu_memory": None,
    "made": "2026-01-02T03:04:05",
    "torch": "2",
    "commit": "abc",
}
CPU = "A, 2 cores"


def series(name, axis, seconds, sizes=(10, 20, 40, 80), memory=lambda size: 0, **fixed):
    points = [{"size": s, "seconds": seconds(s), "memory": memory(s), "device_memory": None} for s in sizes]
    return {
        "name": f"growth, {name}, {axis}",
        "cost": name,
        "axis": axis,
        "device": "cpu",
        "fixed": fixed,
        "points": points,
    }


def line(name="rank", **other):
    return {
        "name": name,
        "device": "cpu",
        "work": "it",
        "seconds": [2.0],
        "median": 2.0,
        "memory": 4e6,
        "device_memory": None,
        "flops": 30,
        "bytes": 5,
        "precision": "fp32",
        "shares": {"compute": 0.3, "copy": 0.1, "roof": 0.3},
        "bars": [],
        **other,
    }


def result(lines=(), growth=(), **ceilings):
    return {
        "schema": 1,
        "scale": "full",
        "machine": MACHINE,
        "lines": list(lines),
        "growth": list(growth),
        "ceilings": {"cpu": {"fp32": 50.0, "bf16": 100.0, "copy": 4.0} | ceilings},
    }


def test_exponent_of_a_power_law_is_found_without_an_interval():
    (fit,) = cost.exponents(
        cost.growth_frame([result(growth=[series("rank", "clips", lambda s: 3 * s**1.5)])])
    ).to_dict("records")
    assert [fit["exponent"], fit["low"], fit["high"]] == pytest.approx([1.5] * 3)
    assert fit["grows"] == "faster"
    assert (fit["first"], fit["last"], fit["n"]) == (10, 80, 4)
    assert fit["centre"] == pytest.approx(3 * fit["middle"] ** 1.5)


def test_interval_of_an_exponent_is_the_t_interval_of_the_slope():
    # log-log points (0, 0), (1, 1), (2, 1): slope 1/2, residuals -1/6, 1/3, -1/6, standard error sqrt(1/12), t 12.706.
    steps = dict(zip((1, 10, 100), (1.0, 10.0, 10.0)))
    (fit,) = cost.exponents(
        cost.growth_frame([result(growth=[series("rank", "clips", steps.get, tuple(steps))])])
    ).to_dict("records")
    assert fit["exponent"] == pytest.approx(0.5)
    assert fit["high"] - 0.5 == pytest.approx(12.706 * (1 / 12) ** 0.5, rel=1e-4)
    assert fit["grows"] == "in proportion"


def test_two_sizes_are_no_series():
    assert cost.exponents(cost.growth_frame([result(growth=[series("rank", "clips", float, (1, 2))])])).empty


RANKED = [
    series("rank", "clips", lambda s: 1e-3 * s * 5, identities=5),
    series("rank", "identities", lambda s: 1e-3 * s * 30, clips=30),
]


def test_prediction_of_a_product_of_sizes_is_the_product():
    (found,) = prediction.predict([result(growth=RANKED, fp32=1e12)], clips=8_000, identities=500, faces=2).to_dict(
        "records"
    )
    assert [found[name] for name in ("power", "low", "high", "line", "seconds")] == pytest.approx(
        [1e-3 * 8_000 * 500] * 5
    )
    assert found["floor"] == 2 * 8_000 * 500 * 512 / 1e12 and found["verdict"] == prediction.AS_IT_IS


def test_prediction_is_not_below_the_counted_operations():
    (found,) = prediction.predict([result(growth=RANKED, fp32=1e6)], clips=8_000, identities=500, faces=2).to_dict(
        "records"
    )
    assert found["seconds"] == found["floor"] == 2 * 8_000 * 500 * 512 / 1e6


def test_a_fixed_part_is_not_taken_for_slow_growth():
    grown = [series("open", "clips", lambda s: 10 + 0.1 * s)]
    (found,) = prediction.predict([result(growth=grown)], clips=1e6, identities=5, faces=2).to_dict("records")
    assert found["line"] == pytest.approx(10 + 1e5) == found["seconds"] and found["power"] < 1e4


def test_memory_grows_along_its_line_and_is_held_against_the_machine():
    grown = [series("import", "faces", lambda s: 1e-3 * s, memory=lambda s: 100 + 7 * s)]
    for clips, verdict in ((1e6, prediction.AS_IT_IS), (1e9, "too large")):
        (found,) = prediction.predict([result(growth=grown)], clips=clips, identities=5, faces=2, hours=1e9).to_dict(
            "records"
        )
        assert found["memory"] == pytest.approx(100 + 7 * 2 * clips) and found["verdict"] == verdict
    (found,) = prediction.predict([result(growth=grown)], clips=1e9, identities=5, faces=2, hours=1).to_dict("records")
    assert found["verdict"] == "too slow and too large"  # 2 million s and 14 GB where there are 3,600 and 10


def test_counted_memory_is_classifier_states_logits_and_features():
    assert prediction.counted_memory("train", 7, 10, batch=3) == 10 * 640 * 4 * 4 + 3 * 3 * 10 * 4
    assert prediction.counted_memory("rank", 7, 10, batch=3) == 17 * 512 * 4 + 10 * 100 * 12


def test_a_part_that_does_not_work_as_measured_names_what_it_needs():
    grown = [*RANKED, series("open", "clips", lambda s: 1e-6 * s)]
    predicted = prediction.predict([result(growth=grown, fp32=1e12)], clips=1e5, identities=1e5, faces=2)
    assert prediction.works(predicted).to_dict() == {"rank": False, "open": True}
    shown = prediction.shown(predicted).set_index("part")
    assert shown.loc["rank", ["time", "verdict", "needs"]].tolist() == [
        "116 days",
        "too slow",
        prediction.REMEDY["rank"],
    ]
    assert shown.loc["open", ["at least", "verdict", "needs"]].tolist() == ["", prediction.AS_IT_IS, ""]


def test_a_part_works_that_works_on_one_of_two_processors():
    predicted = pd.DataFrame(
        {"part": ["rank", "rank", "train"], "verdict": ["too slow", prediction.AS_IT_IS, "too slow"]}
    )
    assert prediction.works(predicted).to_dict() == {"rank": True, "train": False}
    predicted.loc[2, "verdict"] = prediction.BY_ESTIMATE
    assert prediction.works(predicted).all()
    assert prediction.best(predicted)["verdict"].to_dict() == {
        "rank": prediction.AS_IT_IS,
        "train": prediction.BY_ESTIMATE,
    }
    predicted.loc[2, "verdict"] = prediction.NOT_BY_ESTIMATE  # which is better than surely, and worse than no
    assert prediction.works(predicted).to_dict() == {"rank": True, "train": False}
    assert prediction.best(predicted)["verdict"]["train"] == prediction.NOT_BY_ESTIMATE


def test_a_verdict_is_open_where_the_limit_lies_in_the_interval_on_either_side_of_the_estimate():
    noisy = dict(zip((10, 20, 40, 80), (1.0, 3.0, 3.0, 9.0)))  # about in proportion
    grown = [series("open", "clips", noisy.get)]
    sizes = {"clips": 8_000, "identities": 5, "faces": 2}  # a hundred times the last
    found = prediction.predict([result(growth=grown)], **sizes).iloc[0]
    assert found["low"] < found["seconds"] < found["high"]
    for hours, said, needs in (
        (found["high"] / 3_599, prediction.AS_IT_IS, ""),
        (found["seconds"] / 3_599, prediction.BY_ESTIMATE, ""),
        (found["seconds"] / 3_601, prediction.NOT_BY_ESTIMATE, prediction.REMEDY["open"]),
        (found["low"] / 3_599, prediction.NOT_BY_ESTIMATE, prediction.REMEDY["open"]),
        (found["low"] / 3_601, "too slow", prediction.REMEDY["open"]),
    ):
        again = prediction.predict([result(growth=grown)], **sizes, hours=hours).iloc[0]
        assert (again["verdict"], again["needs"]) == (said, needs)


def test_the_time_that_is_told_is_of_the_processor_on_which_a_part_works_and_has_an_interval_where_that_is_open():
    row = {"off": 2.0, "low": 1.0, "high": 60.0, "floor": 3.0, "memory": 2e9}
    rows = [("rank", 100.0, "too slow"), ("rank", 5.0, prediction.AS_IT_IS), ("train", 50.0, prediction.BY_ESTIMATE)]
    frame = pd.DataFrame([row | dict(zip(("part", "seconds", "verdict"), each)) for each in rows])
    told = prediction.told(frame)
    assert told == {"works": ["rank (5 s, 2 GB)"], "tight": ["train (50 s [3 s, 2 min], 2 GB)"], "fails": []}
    assert prediction.told(frame[:1])["fails"] == ["rank (100 s, 2 GB)"]
    beyond = frame[2:].assign(seconds=200.0)  # by its line, which the interval of the power law does not know
    assert prediction.told(beyond)["tight"] == ["train (3.33 min [3 s, 3.33 min], 2 GB)"]


def test_parts_break_in_the_order_of_the_sizes_at_which_they_fail():
    # With the challenge's 100,000 clips: opening takes 1,000 s of ten hours, and so breaks above 36 times; the metric
    # takes 0.1 s, and never does; ranking takes a million seconds at once.
    grown = [series("metric", "clips", lambda s: 1e-6 * s), series("open", "clips", lambda s: 1e-2 * s), *RANKED]
    broken = prediction.breaks([result(growth=grown, fp32=1e12)], faces=2, hours=10)
    assert broken.to_dict() == {"rank": 1.0, "open": min(times for times in prediction.TIMES if times > 36)}


def test_every_cost_that_grows_has_a_remedy():
    assert {prediction.PARTS.get(cost, cost) for cost in growth.COSTS} <= prediction.REMEDY.keys()


def test_an_index_compares_with_the_centres_and_the_clips_of_its_lists():
    # 10,000 clips in 100 lists of 100: 3 lists are 300 clips and 100 centres, of 512 products and sums each.
    found = prediction.index(clips=1e4, identities=7, probes=3)
    assert found == {"lists": 100, "exact": 2 * 1e4 * 7 * 512, "approximate": 2 * 7 * 512 * 400}


def test_a_line_stands_beside_the_released_code_and_another_way():
    other = {"median": 6.0, "memory": 2e6, "work": "by hand, on the same clips"}
    beside = cost.beside_frame([result([line(reference=other, baseline=other)])])
    assert beside["against"].tolist() == [cost.RELEASED, "another way: by hand"]
    assert beside["times"].tolist() == [3, 3] and beside["times the memory"].tolist() == [0.5, 0.5]
    assert beside[["seconds", "their seconds", "MB", "their MB"]].values.tolist() == [[2, 6, 4, 2]] * 2


def test_a_line_that_took_no_memory_has_no_ratio_of_it():
    other = {"median": 6.0, "memory": 2e6, "work": "it"}
    assert cost.beside_frame([result([line(memory=0, reference=other)])])["times the memory"].isna().all()


def test_ratios_and_durations_are_written_as_they_are_read():
    assert (cost.times_text(3.0), cost.times_text(0.5)) == ("3 times faster", "2 times slower")


def test_bars_say_what_they_are_against_and_if_they_are_met():
    bars = [
        {"quantity": "seconds", "other": "reference", "bound": 3, "value": 4, "met": True},
        {"quantity": "memory", "other": "", "bound": 3, "value": 4, "met": False},
    ]
    frame = cost.bar_frame([result([line(bars=bars)])])
    assert frame[["quantity", "against", "bound", "value", "met"]].values.tolist() == [
        ["seconds", cost.RELEASED, 3, 4, "met"],
        ["memory", "at most, bytes", 3, 4, "missed"],
    ]


def test_work_that_is_the_same_is_not_said_again():
    frame = cost.line_frame([result([line(work="a"), line("b", work="a"), line(work="b"), line("c", work="a")])])
    assert frame["work"].tolist() == ["a", "the same", "b", "a"]


def test_a_line_that_was_not_measured_says_why():
    skipped = {"name": "challenge, one member", "device": "cpu", "skipped": "hours"}
    failed = {"name": "book", "device": "cpu", "failed": "no network"}
    frame = cost.line_frame([result([line(), skipped, failed])])
    assert frame["work"].tolist() == ["it", "not measured: hours", "not measured: it failed"]
    assert frame["seconds"].tolist() == pytest.approx([2, float("nan"), float("nan")], nan_ok=True)


def test_epochs_share_a_mark():
    frame = cost.roofline_frame([result([line("epoch, mean", flops=9), line("epoch, NAN", flops=9), line(flops=9)])])
    assert frame["mark"].tolist() == 2 * ["an epoch, any aggregator"] + ["rank"]


def test_the_roof_is_the_lower_of_computing_and_copying():
    frame = cost.roofline_frame([result([line(), line(flops=1000), line(flops=0), line(flops=None)])])
    assert frame["intensity"].tolist() == [6, 200] and frame["reached"].tolist() == [15, 500]
    assert frame["attainable"].tolist() == [24, 50]


def test_extraction_counts_pictures_searched_and_faces():
    forward = line("forward, scene network", flops=20e9)  # 10 GFLOP/s
    found = prediction.extraction_frame(
        [result([forward])],
        clips=100,
        clip_seconds=2,
        rate=5,
        faces=3,
        hours=0.1,
        gflop={prediction.SEARCH: 0.5, "small": 1.0, "large": 100.0},
    )
    # 100 clips of 10 pictures, half an operation each, and of 3 faces: 500 + 300 or 30,000 GFLOP at 10 a second.
    assert (found["hours"] * 3_600).tolist() == pytest.approx([80, 3_050])
    assert found["fits"].tolist() == [True, False]
    assert (found["needed GFLOP/s"] * 360).tolist() == pytest.approx([800, 30_500])


def test_a_file_without_reference_growth_or_networks_is_read_as_such():
    results = [result([{"name": "challenge, one member", "device": "cpu", "skipped": "hours"}])]
    predicted = prediction.predict(results, clips=5, identities=5, faces=1)
    assert prediction.works(predicted).empty and prediction.shown(predicted).empty
    fits = cost.exponents(cost.growth_frame(results))
    assert fits.empty and cost.beside_frame(results).empty and cost.bar_frame(results).empty
    asked = {"clips": 1, "clip_seconds": 1, "rate": 1, "faces": 1, "gflop": {}, "hours": 1}
    assert prediction.extraction_frame(results, **asked).empty


def test_files_are_read_by_name_and_others_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no file benchmark_"):
        cost.read(tmp_path)
    for name, commit in (("benchmark_b.json", "two"), ("benchmark_a.json", "one")):
        (tmp_path / name).write_text(json.dumps(result() | {"machine": MACHINE | {"commit": commit}}))
    assert [found["machine"]["commit"] for found in cost.read(tmp_path)] == ["one", "two"]
    (tmp_path / "benchmark_c.json").write_text('{"schema": 7, "lines": [], "growth": []}')
    with pytest.raises(ValueError, match="benchmark_c.json: not a file of the benchmark command"):
        cost.read(tmp_path)


def test_machines_are_said_with_date_commit_and_scale():
    frame = cost.machine_frame([result(), result() | {"scale": "tiny", "machine": MACHINE | {"gpu": "G"}}])
    assert frame.iloc[0].tolist() == ["2026-01-02", "A", 2, 10, "none", "2", "abc", "full"]
    assert frame.loc[1, ["GPU", "scale"]].tolist() == ["G", "tiny"]
    assert (
        cost.where(result() | {"machine": MACHINE | {"gpu": "G"}}, "cuda") == "G" and cost.where(result(), "cpu") == CPU
    )


def test_growth_has_a_panel_a_series_with_its_points_and_fit():
    results = [
        result(growth=[*RANKED, series("open", "clips", lambda s: s**0.5), series("metric", "identities", float)])
    ]
    points = cost.growth_frame(results)
    figure = drawing.growth(points, cost.exponents(points))
    assert "Measured 2026-01-02 on A, commit abc." in figures.drawing(figure)
    assert [(ax.get_ylabel(), ax.get_xlabel()) for ax in figure.axes] == [
        ("rank", "clips"),
        ("rank", "identities"),
        ("open", "clips"),
        ("metric", "identities"),
    ]
    assert figure.axes[0].get_gridspec().ncols == 2  # no row of one panel
    measured, fitted = figure.axes[2].lines
    assert measured.get_xdata().tolist() == [10, 20, 40, 80]
    assert fitted.get_ydata() == pytest.approx(measured.get_ydata())
    plt.close("all")


def test_figures_of_a_file_without_growth_and_operations_are_drawn():
    empty = cost.growth_frame([result()])
    assert drawing.growth(empty, cost.exponents(empty)).axes == []
    (ax,) = drawing.roofline(cost.roofline_frame([result()]), cost.ceiling_frame([result()])).axes
    assert [line.get_label() for line in ax.lines] == ["fp32", "bf16"]
    plt.close("all")


def test_roofs_meet_their_ceilings_and_lines_stand_where_they_were_measured():
    results = [result([line(flops=1000)])]
    (ax,) = drawing.roofline(cost.roofline_frame(results), cost.ceiling_frame(results)).axes
    single, half, mark = ax.lines
    assert max(single.get_ydata()) == pytest.approx(50e-9) and max(half.get_ydata()) == pytest.approx(100e-9)
    assert (mark.get_xdata(), mark.get_ydata()) == (pytest.approx([200]), pytest.approx([500e-9]))
    plt.close("all")


def test_lean_table_names_the_place_only_where_there_are_several():
    one = pd.DataFrame(
        {"line": ["a", "b"], "where": ["here", "here"], "seconds": [1.0, 2.0], "MB on the GPU": [None, None]}
    )
    assert list(cost.lean(one)) == ["line", "seconds"]
    two = one.assign(where=["here", "there"], **{"MB on the GPU": [None, 3.0]})
    assert list(cost.lean(two)) == list(two)
    assert list(cost.lean(one.iloc[:0])) == list(one)


def test_ten_times_the_challenge_is_held_against_what_a_part_of_it_took():
    row = {"name": "tenfold, rank", "device": "cpu", "seconds": [2e8], "median": 2e8}
    full = [result(growth=RANKED, lines=[row], fp32=1e12) | {"scale": "full"}]
    (found,) = prediction.tenfold_frame(full).to_dict("records")
    assert found["part"] == "rank" and found["times"] == pytest.approx(2e8 / (1e-3 * 1e6 * 1e5))
    assert prediction.tenfold_frame([result(growth=RANKED, lines=[row]) | {"scale": "tiny"}]).empty
    assert prediction.tenfold_frame([result(growth=RANKED) | {"scale": "full"}]).empty


@pytest.mark.parametrize(("took", "off"), [(2e8, 2), (5e7, 1)])
def test_a_part_that_took_longer_than_predicted_is_predicted_to_take_longer(took, off):
    row = {"name": "tenfold, rank", "device": "cpu", "seconds": [took], "median": took}
    sizes = {"clips": 8_000, "identities": 500, "faces": 2}
    (found,) = prediction.predict([result(growth=RANKED, lines=[row], fp32=1e12)], **sizes).to_dict("records")
    assert found["off"] == pytest.approx(off) and found["seconds"] == pytest.approx(off * 1e-3 * 8_000 * 500)
    assert found["high"] == pytest.approx(1e-3 * 8_000 * 500)  # of the fit alone


def test_an_epoch_that_draws_its_classes_has_a_step_for_every_batch_of_clips():
    drawn = series("drawn epoch", "identities", lambda size: 1e-3 * size, clips=1_000)
    few, many = (
        prediction.predict([result(growth=[drawn], fp32=1e30)], clips=clips, identities=800, faces=1)
        for clips in (1_000, 50_000)
    )
    assert few["power"].item() == pytest.approx(0.8) and few["line"].item() == pytest.approx(0.8)
    for name in ("seconds", "power", "low", "high", "line"):
        assert many[name].item() == pytest.approx(50 * few[name].item()), name


def test_drawing_classes_pays_from_the_first_size_after_which_it_is_always_faster():
    whole = series("epoch", "identities", {100: 1, 200: 5, 300: 9, 400: 16}.get, (100, 200, 300, 400))
    drawn = series("drawn epoch", "identities", {100: 0.5, 200: 6, 300: 3, 400: 4}.get, (100, 200, 300, 400))
    for grown in ([whole, drawn], [drawn, whole]):
        assert prediction.pays_from([result(growth=grown)]).startswith("300 on, and 4 times faster with 400")
    assert prediction.pays_from([result(growth=[whole])]) == "sizes that were not measured"
