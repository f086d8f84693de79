"""The benchmark command: what it measures, counts and saves, and what it says of a checkout that is none."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import growth, lines, meter, ranking, reference, training
from benchmarks.data import SCALES
from mmlib.aggregate import FixedPool
from mmlib.data.submission import read_result, read_val_truth
from mmlib.experiment import Training
from mmlib.metrics import official_score
from mmlib.models import IdentityModel


def clears_peak() -> bool:
    """Say whether the system lets a process forget its peak of memory."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return True
    except OSError:
        return False


@pytest.mark.skipif(not clears_peak(), reason="the peak of memory cannot be reset here")
def test_memory_is_what_the_peak_grew_by():
    found = meter.measure(lambda: np.ones(2**24, np.float32), repeats=2)  # 64 MiB, freed between the calls
    assert 2**26 * 0.9 < found["memory"] < 2**26 * 1.5
    assert len(found["seconds"]) == 2 and found["device_memory"] is None


def test_warm_calls_are_made_and_not_timed():
    calls = []
    assert len(meter.measure(lambda: calls.append(1), repeats=2, warm=3)["seconds"]) == 2
    assert len(calls) == 5


def test_a_step_runs_in_a_process_of_its_own_without_a_gpu():
    assert meter.isolated("machine:describe")["gpu"] is None


def test_a_step_that_fails_says_why():
    with pytest.raises(meter.StepFailed, match="ranking:nothing.*no attribute 'nothing'"):
        meter.isolated("ranking:nothing")


CEILINGS = {"fp32": 100.0, "bf16": 400.0, "copy": 10.0}


def row(**other):
    return {
        "name": "rank",
        "device": "cpu",
        "scale": "full",
        "seconds": [3.0, 2.0, 9.0],
        "memory": 50,
        "flops": 120,
        "bytes": 6,
        "precision": "fp32",
        **other,
    }


def test_shares_are_those_of_the_ceilings_in_the_median_time():
    # 120 operations in 3 s are 40 a second of 100; 6 bytes in 3 s are 2 a second of 10.
    assert command.finish(row(), CEILINGS, ())["shares"] == {"compute": 0.4, "copy": 0.2, "roof": 0.4}
    assert command.finish(row(precision="bf16"), CEILINGS, ())["shares"]["roof"] == 0.2
    assert command.finish(row(flops=None), CEILINGS, ())["shares"] == {}


def test_bars_hold_medians_and_memory_against_the_other():
    bars = (lines.Bar("seconds", "reference", 2), lines.Bar("memory", "reference", 3), lines.Bar("memory", most=49))
    bars += (lines.Bar("seconds", most=2), lines.Bar("seconds", most=4))
    other = {"seconds": [6.0], "memory": 149}
    found = command.finish(row(reference=other), CEILINGS, bars)
    assert [(bar["value"], bar["met"]) for bar in found["bars"]] == [
        (2, True),
        (2.98, False),
        (50, False),
        (3, False),
        (3, True),
    ]


def test_known_rows_that_are_still_to_come_are_saved_too():
    line, series = {"name": "rank", "device": "cpu", "seconds": [1]}, {"name": "growth", "device": "cpu", "points": []}
    found = {"lines": [line], "growth": [], "scale": "full"}
    saved = command.with_known(found, [line, line | {"device": "cuda"}, series])
    assert saved == {"lines": [line, line | {"device": "cuda"}], "growth": [series], "scale": "full"}
    assert found["growth"] == []


def test_bars_without_a_reference_and_at_a_small_scale_are_left_out():
    bars = (lines.Bar("seconds", "reference", 2),)
    assert command.finish(row(), CEILINGS, bars)["bars"] == []
    assert command.finish(row(reference={"failed": "no data"}), CEILINGS, bars)["bars"] == []
    assert command.finish(row(scale="tiny", reference={"seconds": [1.0], "memory": 1}), CEILINGS, bars)["bars"] == []


def pooled(identities=7, dim=8):
    return IdentityModel(FixedPool(dim, lambda x, mask, q, d: x.mean(1)), identities, hidden=0)


BATCHES = Training(epochs=1, batch=2, frames=3, optimiser="sgd", sample="replace")


def test_operations_of_a_step_are_those_of_the_products(bare):
    clips = bare.select("train")
    # Forward, and backward to the identities' vectors; nothing before the classifier is learned.
    assert training.step_flops(pooled(), bare, clips, BATCHES) == 2 * (2 * 2 * 8 * 7)


@pytest.mark.parametrize("optimiser, numbers", [("sgd", 8), ("adamw", 10)])
def test_bytes_of_an_epoch_are_frames_and_parameters(bare, optimiser, numbers):
    found = training.epoch_bytes(pooled(), bare, bare.select("train"), replace(BATCHES, optimiser=optimiser))
    assert found == 6 * (4 * 3 * 8) + 2 * 4 * numbers * 7 * 8


def test_names_choose_every_line_that_begins_so():
    found, series, scene, parity = lines.chosen(["epoch, NAN", "growth, rank"])
    assert [line.name for line in found] == ["epoch, NAN", "epoch, NAN, two blocks", "epoch, NAN + scores"]
    assert [line.name for line in series] == ["growth, rank, clips", "growth, rank, identities"]
    assert not (scene or parity)
    assert lines.chosen([]) == (lines.LINES, lines.GROWTH, True, True)


def test_a_name_of_no_line_is_refused():
    with pytest.raises(ValueError, match="--only epohc: no line begins so; there are import, open"):
        lines.chosen(["epohc"])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("series", growth.SERIES)
def test_a_series_has_four_growing_sizes_and_what_it_needs(series, scale):
    along, fixed = growth.sizes(series, scale)
    assert len(set(along)) >= 4 and list(along) == sorted(along)
    assert min(along + tuple(fixed.values())) >= 1 and series.split(", ")[1] not in fixed


def test_ranking_problem_has_no_clip_twice_and_the_clips_asked_for():
    identity, ranking_of = ranking.ranking_problem(500, 20, 60)
    assert all(len(set(found)) == ranking.K for found in ranking_of.tolist())
    assert np.bincount(identity + 1).tolist() == [440] + [3] * 20


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, capsys):
    (tmp_path / "utils.py").touch()
    with pytest.raises(ValueError, match=r"--reference .*: no checkout .*: no evaluation_map.py"):
        reference.check(tmp_path)
    with pytest.raises(SystemExit):
        command.main(["--reference", str(tmp_path)])
    assert "no evaluation_map.py" in capsys.readouterr().err


SCRIPT = """
import time
import torch

def main(args):
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.epoch)
    for epoch in range(args.epoch):
        time.sleep(9 if args.num_classes != 21 else .1 + .2 * epoch)
        optimiser.step()
        schedule.step()
"""


@pytest.fixture
def stand_in(tmp_path):
    """A folder with the modules of the released code that the command calls, and nothing of what they do."""
    folder = tmp_path / "code"
    (folder / "datasets").mkdir(parents=True)
    (folder / "datasets" / "iqiyi_dataset.py").touch()
    (folder / "utils.py").touch()
    (folder / "evaluation_map.py").write_text("import time\ndef calculate_map(truth, result):\n    time.sleep(.2)\n")
    (folder / "demo_train_face_scene_multi_view.py").write_text(SCRIPT)
    return folder


def test_epochs_of_the_released_script_are_timed_from_step_to_step(stand_in, tmp_path):
    found = meter.isolated("reference:epoch", folder=str(tmp_path), scale="tiny", reference=str(stand_in))
    second, third = found["seconds"]  # the first is not counted
    assert second >= 0.3 and third >= 0.5


def test_the_command_saves_a_line_beside_the_other_code_with_ceilings(stand_in, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "benchmark_new.json"
    monkeypatch.setattr(command, "chosen", lambda names: (lines.chosen(names)[0][:1], [], False, False))
    asked = ["--scale", "tiny", "--only", "metric", "--reference", str(stand_in), "--save", str(saved)]
    assert command.main(asked) == 0
    found = json.loads(saved.read_text())
    (scored,) = (line for line in found["lines"] if line["device"] == "cpu")
    assert (scored["name"], scored["scale"]) == ("metric", "tiny")
    assert scored["ratios"]["reference"]["seconds"] == scored["reference"]["median"] / scored["median"]
    assert scored["reference"]["median"] >= 0.2 and all(value > 0 for value in found["ceilings"]["cpu"].values())
    assert found["machine"]["torch"] == torch.__version__ and found["schema"] == 1
    assert "seconds of reference x" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()].count(saved.name) == len(list(tmp_path.glob("*.json*")))


def test_a_line_that_fails_is_said_and_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    saved = tmp_path / "benchmark_new.json"
    broken = [lines.Line("broken", "ranking:nothing"), lines.Line("metric, bootstrap", "ranking:bootstrap")]
    monkeypatch.setattr(command, "chosen", lambda names: (broken, [], False, False))
    roof = dict.fromkeys(("fp32", "bf16", "copy"), 1.0)  # measuring it takes seconds, and is no matter here
    monkeypatch.setattr(
        command, "isolated", lambda step, **o: roof if step == "machine:ceilings" else meter.isolated(step, **o)
    )
    assert command.main(["--scale", "tiny", "--save", str(saved)]) == 1
    assert "failed: ranking:nothing" in capsys.readouterr().out
    first, second = json.loads(saved.read_text())["lines"]
    assert "nothing" in first["failed"] and second["median"] > 0


def test_another_library_that_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytrec_eval", None)
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.losses", None)
    with pytest.raises(RuntimeError, match="not installed here: pip install pytrec-eval-terrier"):
        ranking.metric_trec(str(tmp_path))
    with pytest.raises(RuntimeError, match="not installed here: pip install pytorch-metric-learning"):
        training.loss_elsewhere("tiny")


def test_another_library_scores_the_same_files_alike(tmp_path):
    pytest.importorskip("pytrec_eval")
    ranking.make_ranking(str(tmp_path), "tiny")
    score = official_score(read_val_truth(tmp_path / "val_gt.txt"), read_result(tmp_path / "result.txt"))
    assert ranking.metric_trec(str(tmp_path))["work"].endswith(f", {score.map_at_k:.6f}") and score.map_at_k > 0


def test_parity_alone_needs_the_released_code(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--only", "parity"])
    assert stopped.value.code == 2 and "parity needs the released code: --reference" in capsys.readouterr().err
