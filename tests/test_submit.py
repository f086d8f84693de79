import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from mmlib import retrieve as retrieve_module
from mmlib import submit
from mmlib.data.iqiyi import export_folder
from mmlib.data.store import ClipStore
from mmlib.data.submission import read_result, read_val_truth
from mmlib.metrics import official_score
from mmlib.records import run
from mmlib.retrieve import retrieve
from mmlib.studies import ladder
from mmlib.submit import members_folder, predict, predict_shard
from mmlib.systems import SYSTEMS, with_members, without_scores

SHORT = {"epochs": 1, "members": 2, "device": "cpu"}  # where training twice gives the same bytes


def asked(store, system):
    """The experiment of SHORT, built by hand."""
    e = replace(SYSTEMS[system], data=str(store.path))
    return with_members(replace(e, training=replace(e.training, epochs=1)), 2)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def made_store(path, presence, *, scores=("quality", "det"), identities=2):
    """A store whose clips are (split, identity, face frames, scene frames); no scenes at all if none has any."""
    split, identity, *counts = zip(*presence)
    clips = pd.DataFrame({"clip": [f"c{i}" for i in range(len(presence))], "split": split, "identity": identity})
    rng = np.random.default_rng(0)
    spans = {}
    with ClipStore.create(path, simulated=False, provenance={}) as writer:
        for name, width, count in zip(("face", "scene"), (32, 64), map(np.array, counts)):
            if count.sum():
                columns = {score: np.full(count.sum(), 0.5) for score in scores} if name == "face" else {}
                writer.append(name, rng.normal(size=(count.sum(), width)).astype(np.float16), **columns)
                spans[name] = np.cumsum(count) - count, count
        writer.finish(clips, [f"{i}" for i in range(identities)], spans)
    return path


def renamed(path, table, column, old, new):
    """Write a name into a table of a store, as older versions did unchecked."""
    rows = pd.read_parquet(path / table).replace({column: {old: new}})
    rows.to_parquet(path / table)


TRAIN = [("train", 0, 2, 1), ("train", 0, 1, 1), ("train", 1, 3, 1), ("train", 1, 1, 1)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three identities, each with three train and two val clips, a distractor, two test clips."""
    clips = [("train", i, 2, 1) for i in (0, 1, 2)] * 3 + [("val", i, 3, 1) for i in (0, 1, 2, -1)] * 2
    return made_store(tmp_path_factory.mktemp("small") / "store", clips + [("test", -1, 2, 1)] * 2, identities=3)


# -- the result ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["one-name", "one-name-as-coded", "face-only"])
def test_result_is_what_retrieve_ranks(store, tmp_path, system):
    members = None if system == "face-only" else 2
    predict(store.path, tmp_path / "result.txt", system=system, epochs=1, members=members, device="cpu")
    found = retrieve(asked(store, system), store, device="cpu")
    clips = store.clips["clip"].to_numpy()[found.gallery]
    expected = {
        store.identities[code]: [clips[row] for row in line if row >= 0]
        for code, line in zip(found.queries, found.ranking)
    }
    identities, ranked = read_result(tmp_path / "result.txt")
    assert dict(zip(identities, ranked)) == expected and len(identities) == len(expected)
    assert names_in(tmp_path) == ["result.txt"]


def test_official_score_of_one_name_is_the_map_of_the_top_rung_of_the_ladder(store, tmp_path):
    rung = ladder.plan(members=2)["described: fallback"]
    rung = replace(rung, data=str(store.path), training=replace(rung.training, epochs=1))
    predict(store.path, tmp_path / "result.txt", **SHORT)
    export_folder(store, tmp_path / "official")
    score = official_score(read_val_truth(tmp_path / "official/val_gt.txt"), read_result(tmp_path / "result.txt"))
    assert score.map_at_k == run(rung, store, device="cpu").measures["map_at_100"]


def test_threads_decide_nothing(store, tmp_path):
    """With several, products are cut up and so rounded differently, and so many processes train and rank."""
    threads, whole = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            report = predict(store.path, tmp_path / "result.txt", **SHORT | {"members": 4}, overwrite=True)
            whole.append((report.trained, (tmp_path / "result.txt").read_bytes()))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert whole[0] == whole[1] and whole[0][0] == 8


def test_report_counts_what_is_missing(tmp_path):
    val = [("val", 0, 2, 1), ("val", 1, 1, 0), ("val", 1, 1, 0), ("val", 0, 0, 1), ("val", -1, 0, 0), ("val", 3, 1, 1)]
    # identity 2 has no clip in val and none in train, identity 3 none in train
    report = predict(made_store(tmp_path / "store", TRAIN + val, identities=4), tmp_path / "result.txt", **SHORT)
    assert report.lines[:-1] == [
        f"wrote {tmp_path / 'result.txt'}: 4 identities, at most 100 clips each",
        "members: 4 trained, 0 loaded",
        "val: 6 clips, 5 ranked",
        "without face, ranked by scene alone: 1 clips",
        "with face and without scene: 2 clips",
        "without face or scene, not ranked: 1 clips",
        "without a train clip, ranked by chance: 2 identities",
        "without a labelled val clip: 1 identities; a ground truth that does not list them may refuse their lines, "
        "and --labelled-only leaves them out",
    ]
    identities, ranked = read_result(tmp_path / "result.txt")
    assert identities == ["0", "1", "2", "3"]
    assert all(sorted(line) == ["c4", "c5", "c6", "c7", "c9"] for line in ranked)


def test_identities_without_a_labelled_clip_are_left_out_when_told(tmp_path):
    path = made_store(tmp_path / "store", [*TRAIN, ("val", 1, 1, 1)])
    for labelled_only, identities in ((False, ["0", "1"]), (True, ["1"])):
        predict(path, tmp_path / "result.txt", **SHORT, labelled_only=labelled_only, overwrite=True)
        assert read_result(tmp_path / "result.txt") == (identities, [["c4"]] * len(identities))


def test_a_store_without_labels_in_val_gets_a_ranking(tmp_path):
    path = made_store(tmp_path / "store", [*TRAIN, ("val", -1, 1, 1)])
    report = predict(path, tmp_path / "result.txt", **SHORT)
    assert any(line.startswith("without a labelled val clip: 2 identities") for line in report.lines)
    assert read_result(tmp_path / "result.txt") == (["0", "1"], [["c4"], ["c4"]])


def test_faces_alone_rank_no_clip_without_one(tmp_path):
    path = made_store(tmp_path / "store", [*TRAIN, ("val", 0, 1, 1), ("val", 1, 0, 1)])
    report = predict(path, tmp_path / "result.txt", system="face-only", epochs=1)
    assert report.lines[2:4] == ["val: 2 clips, 1 ranked", "without face, not ranked: 1 clips"]
    assert read_result(tmp_path / "result.txt") == (["0", "1"], [["c4"], ["c4"]])


def test_simulated_clips_are_said_to_be(store, tmp_path):
    said = "simulated: no score on it is a result on the challenge"
    options = {"system": "face-only", "epochs": 1}
    assert predict(store.path, tmp_path / "one.txt", **options).lines[-1] == said
    real = made_store(tmp_path / "store", [*TRAIN, ("val", 0, 1, 1)])
    assert said not in predict(real, tmp_path / "two.txt", **options).lines


def test_a_store_named_simulated_is_a_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_store(tmp_path / "simulated", [*TRAIN, ("val", 0, 1, 1)])
    assert "val: 1 clips, 1 ranked" in predict("simulated", "result.txt", system="face-only", epochs=1).lines


def test_seed_is_that_of_the_training(store, tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        predict(store.path, tmp_path / name, system="face-only", epochs=1, seed=seed)
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()


def test_what_will_be_done_is_said_and_then_a_line_a_member_that_has_no_bar(store, tmp_path):
    size = {}
    for progress in (False, True):
        lines = size[progress] = []
        out = tmp_path / f"{progress}.txt"
        predict(store.path, out, **SHORT, keep_members=True, progress=progress, say=lines.append)
    plan, *members = size[False]
    assert plan.startswith("to train: 4 of 4 members, 1 epochs each; to rank: ") and str(tmp_path) in plan
    files = sum(path.stat().st_size for path in members_folder(tmp_path / "False.txt").iterdir()) / 1e6
    assert float(plan.split(" MB")[0].split()[-1]) == pytest.approx(files, abs=0.6 + 0.1 * files)
    assert [line.split(":")[0] for line in members] == [f"member {n} of 4" for n in (1, 2, 3, 4)]
    assert members[-1].endswith("about 0 s left") and len(size[True]) == 1


def test_members_that_are_there_are_not_said_to_be_trained(store, tmp_path):
    out, lines = tmp_path / "result.txt", []
    predict(store.path, out, **SHORT | {"members": 1}, keep_members=True)
    predict(store.path, out, **SHORT, overwrite=True, say=lines.append)
    assert lines[0].startswith("to train: 2 of 4 members")
    assert [line.split(":")[0] for line in lines[1:]] == ["member 3 of 4", "member 4 of 4"]


def test_progress_is_shown_when_asked_for(store, tmp_path, capsys):
    for progress in (False, True):
        predict(store.path, tmp_path / "result.txt", system="face-only", epochs=1, progress=progress, overwrite=True)
        out, err = capsys.readouterr()
        assert out == "" and ("members: " in err) == progress and (err == "") == (not progress)


# -- members -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("kept") / "result.txt"
    report = predict(small, out, **SHORT, keep_members=True)
    assert (report.trained, report.loaded) == (4, 0) and f"kept {members_folder(out)}: 4 members" in report.lines
    return out


def times_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture
def kept(original, tmp_path):
    """A result and its four members: its path, its bytes, their times."""
    out = shutil.copy(original, tmp_path / "result.txt")
    shutil.copytree(members_folder(original), members_folder(out))
    times = times_in(members_folder(out))
    assert len(times) == 4
    return out, out.read_bytes(), times


def test_saved_members_are_not_trained_again(small, kept):
    out, content, times = kept
    gone = [*times][2]
    gone.unlink()
    out.unlink()
    report = predict(small, out, **SHORT, keep_members=True)
    assert (report.trained, report.loaded) == (1, 3) and out.read_bytes() == content
    again = times_in(members_folder(out))
    assert again.keys() == times.keys()
    assert {path for path in times if again[path] != times[path]} == {gone}


def test_a_complete_result_needs_its_members_no_more(small, kept):
    out, content, _ = kept
    report = predict(small, out, **SHORT, overwrite=True)
    assert (report.trained, report.loaded) == (0, 4)
    assert out.read_bytes() == content and names_in(out.parent) == ["result.txt"]


def test_loaded_members_rank_as_trained_ones(small, tmp_path, device):
    out, contents = tmp_path / "result.txt", []
    for trained in (4, 0):
        report = predict(small, out, **SHORT | {"device": device}, keep_members=True, overwrite=True)
        assert report.trained == trained
        contents.append(out.read_bytes())
    assert contents[0] == contents[1]


def test_a_moved_store_has_the_same_members(small, kept, tmp_path):
    out, content, _ = kept
    report = predict(shutil.copytree(small, tmp_path / "moved"), out, **SHORT, overwrite=True)
    assert report.loaded == 4 and out.read_bytes() == content


def test_test_clips_are_ranked_by_the_same_members(small, kept):
    out, _, _ = kept
    report = predict(small, out, **SHORT, split="test", overwrite=True)
    assert (report.trained, report.loaded) == (0, 4) and report.lines[2] == "test: 2 clips, 2 ranked"
    identities, ranked = read_result(out)
    assert identities == ["0", "1", "2"] and all(sorted(line) == ["c17", "c18"] for line in ranked)


@pytest.mark.parametrize("other", [{"seed": 1}, {"epochs": 2}, {"system": "one-name-as-coded"}])
def test_members_of_another_run_are_neither_used_nor_removed(small, kept, other):
    out, _, times = kept
    report = predict(small, out, **SHORT | {"members": 1} | other, overwrite=True)
    assert (report.trained, report.loaded) == (2, 0)
    assert f"left in {members_folder(out)}: 4 members of other runs" in report.lines
    assert times_in(members_folder(out)) == times


def test_members_of_another_library_are_not_used(small, kept, monkeypatch):
    monkeypatch.setattr(submit, "library_hash", lambda: "another")
    report = predict(small, kept[0], **SHORT, overwrite=True)
    assert (report.trained, report.loaded) == (4, 0)


def test_members_and_shards_of_another_content_are_not_used(small, kept, monkeypatch):
    work = submit.Work(submit.system_on(ClipStore.open(small), members=2)[0], kept[0].parent, "cpu", None)
    monkeypatch.setattr("mmlib.experiment.fingerprint", lambda path: "another")
    other = submit.Work(work.experiment, kept[0].parent, "cpu", None)
    assert not {*work.members.values()} & {*other.members.values()} and work.shard(1) != other.shard(1)
    assert predict(small, kept[0], **SHORT, overwrite=True).trained == 4


def test_first_members_serve_a_larger_ensemble(small, kept):
    report = predict(small, kept[0], epochs=1, members=3, overwrite=True)
    assert (report.trained, report.loaded) == (2, 4)


def flip(content):
    """Change one byte in the middle, among the weights, which alone does not keep torch from reading them."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


class Call:
    def __reduce__(self):
        return os.mkdir, ("called",)


@pytest.mark.parametrize(
    "spoil", [lambda content: content[:-1000], lambda content: b"", flip, lambda content: pickle.dumps(Call())]
)
def test_a_damaged_member_is_named(small, kept, monkeypatch, spoil):
    out, content, times = kept
    monkeypatch.chdir(out.parent)
    path = [*times][1]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name}: damaged, .* removed, that member is trained again"):
        predict(small, out, **SHORT, overwrite=True)
    assert out.read_bytes() == content and names_in(out.parent) == ["result.txt", "result.txt.members"]
    path.unlink()
    predict(small, out, **SHORT, overwrite=True)
    assert out.read_bytes() == content


def test_a_saved_object_that_is_no_member_is_named_and_not_executed(small, kept, monkeypatch):
    out, _, times = kept
    monkeypatch.chdir(out.parent)
    for saved in ({"state": {}}, Call()):
        torch.save(saved, [*times][0])
        with pytest.raises(ValueError, match=f"{[*times][0].name}: damaged, or not a member"):
            predict(small, out, **SHORT, overwrite=True)
    assert not (out.parent / "called").exists()


def test_what_is_half_written_is_swept(small, kept):
    out, _, times = kept
    path = [*times][0]
    path.rename(path.with_name(f".{path.name}.partial-1"))
    assert predict(small, out, **SHORT, overwrite=True).trained == 1
    assert names_in(out.parent) == ["result.txt"]


def test_a_failure_leaves_the_members_that_are_whole(small, tmp_path, monkeypatch):
    replace_file, calls = os.replace, []

    def fail_at_the_third(source, target):
        if target.suffix == ".pt":  # and not what the store writes of its content when it is first named
            calls.append(target)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_third)
    with pytest.raises(OSError, match="No space left"):
        predict(small, tmp_path / "result.txt", **SHORT)
    assert names_in(tmp_path) == ["result.txt.members"]
    assert names_in(tmp_path / "result.txt.members") == sorted(path.name for path in calls[:2])


# -- shards --------------------------------------------------------------------------------------------------


@pytest.fixture
def blocks(monkeypatch):
    """Few clips a block, so that a small gallery has many."""
    monkeypatch.setattr(retrieve_module, "BLOCK", 16)


@pytest.mark.parametrize("system, shards", [("one-name", 3), ("face-only", 2), ("face-only", 1)])
def test_shards_give_the_bytes_of_one_run(store, tmp_path, blocks, system, shards):
    options = SHORT | {"system": system, "members": 1}
    predict(store.path, tmp_path / "whole.txt", **options)
    reports = [
        predict_shard(store.path, tmp_path / "result.txt", shard, shards, **options) for shard in range(shards, 0, -1)
    ]
    merged = predict(store.path, tmp_path / "result.txt", **options, shards=shards)
    assert (tmp_path / "result.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()
    assert names_in(tmp_path) == ["result.txt", "whole.txt"]
    total = 2 if system == "one-name" else 1
    assert [(report.trained, report.loaded) for report in reports] == [(total, 0)] + [(0, total)] * (shards - 1)
    assert (merged.trained, merged.loaded) == (0, 0) and f"shards: {shards} merged" in merged.lines


def test_shards_make_up_the_gallery(store, tmp_path, blocks):
    options = SHORT | {"system": "face-only", "members": 1}
    reports = [predict_shard(store.path, tmp_path / "result.txt", shard, 3, **options) for shard in (1, 2, 3)]
    ends = [[int(word) for word in report.lines[0].split() if word.isdecimal()] for report in reports]
    clips = len(store.select("val", having="face"))
    assert [end[:2] for end in ends] == [[1, 3], [2, 3], [3, 3]] and all(end[4] == clips for end in ends)
    assert ends[0][2] == 1 and ends[2][3] == clips and [end[3] + 1 for end in ends[:2]] == [end[2] for end in ends[1:]]


def test_shards_that_are_missing_are_ranked_by_the_merge(store, tmp_path, blocks):
    options = SHORT | {"system": "face-only", "members": 1}
    predict(store.path, tmp_path / "whole.txt", **options)
    predict_shard(store.path, tmp_path / "result.txt", 2, 3, **options)
    assert predict(store.path, tmp_path / "result.txt", **options, shards=3).loaded == 1
    assert (tmp_path / "result.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()


def test_a_shard_that_is_there_is_not_ranked_again(store, tmp_path, blocks, monkeypatch):
    options = SHORT | {"system": "face-only", "members": 1}
    assert predict_shard(store.path, tmp_path / "result.txt", 1, 2, **options).ranked == 1
    before = times_in(members_folder(tmp_path / "result.txt"))
    again = predict_shard(store.path, tmp_path / "result.txt", 1, 2, **options)
    assert (again.ranked, again.trained, again.loaded) == (0, 0, 0)
    assert times_in(members_folder(tmp_path / "result.txt")) == before
    for other in ((1, 3, 0), (1, 2, 1)):  # another part, another training
        assert predict_shard(store.path, tmp_path / "result.txt", *other[:2], **options, seed=other[2]).ranked


def test_a_damaged_shard_is_named(store, tmp_path, blocks):
    options, out = SHORT | {"system": "face-only", "members": 1}, tmp_path / "result.txt"
    predict_shard(store.path, out, 1, 2, **options)
    (path,) = members_folder(out).glob("*.npz")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=f"{path.name}: damaged, .* removed, it is ranked again"):
        predict(store.path, out, **options, shards=2)
    path.unlink()
    assert "shards: 2 merged" in predict(store.path, out, **options, shards=2).lines


@pytest.mark.parametrize(
    "shard, shards, message",
    [
        (0, 2, r"shard must lie in \[1, 2\], got 0"),
        (3, 2, r"shard must lie in \[1, 2\], got 3"),
        (1, 2, r"shards must lie in \[1, 1\] for 8 clips in blocks of 1024, got 2"),
    ],
)
def test_shards_that_do_not_exist_are_refused(small, tmp_path, shard, shards, message):
    with pytest.raises(ValueError, match=message):
        predict_shard(small, tmp_path / "result.txt", shard, shards, **SHORT)
    assert names_in(tmp_path) == []


COMMAND = """
import sys
from mmlib import cli, retrieve
retrieve.BLOCK = 16
cli.main()
"""


def command(*arguments):
    """Start the command line in a process of its own, with few clips a block."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "predict", *map(str, arguments)],
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
    )


def test_killed_shard_goes_on_and_no_member_is_trained_twice(patchy, tmp_path, blocks):
    out, folder = tmp_path / "result.txt", members_folder(tmp_path / "result.txt")
    options = {"epochs": 20, "members": 2, "device": "cpu"}
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    shard = command(patchy.path, *arguments, "--out", out, "--shard", "1/2")
    deadline = time.monotonic() + 180
    while not [*folder.glob("*.pt")]:
        assert shard.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    shard.kill()
    assert shard.wait() < 0
    there = {path: when for path, when in times_in(folder).items() if path.suffix == ".pt"}
    report = predict(patchy.path, out, **options, shards=2, keep_members=True)
    assert (report.trained, report.loaded) == (4 - len(there), len(there)) and 1 <= len(there) < 4
    kept = times_in(folder)
    assert len(kept) == 4 and {path: kept[path] for path in there} == there  # and no lock or half a file
    predict(patchy.path, tmp_path / "whole.txt", **options)
    assert out.read_bytes() == (tmp_path / "whole.txt").read_bytes()


# -- refusals ------------------------------------------------------------------------------------------------


def test_a_result_that_exists_is_kept(small, tmp_path):
    (tmp_path / "result.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="result.txt: exists already"):
        predict(small, tmp_path / "result.txt")
    assert (tmp_path / "result.txt").read_text() == "mine" and names_in(tmp_path) == ["result.txt"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"system": "two-name"}, "system must be one of one-name, one-name-as-coded, face-only, got 'two-name'"),
        ({"members": 17}, r"members must lie in \[1, 16\] for one-name, got 17"),
        ({"members": 2, "system": "face-only"}, r"members must lie in \[1, 1\] for face-only, got 2"),
        ({"split": "train"}, "split must be one of val, test, got 'train'"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda, got 'tpu'"),
    ],
)
def test_wrong_arguments_are_named(small, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        predict(small, tmp_path / "result.txt", **wrong)
    assert names_in(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_said(small, tmp_path):
    with pytest.raises(ValueError, match="device cuda: there is no GPU here"):
        predict(small, tmp_path / "result.txt", device="cuda")


@pytest.mark.parametrize(
    "scenes, scores, lacking",
    [
        (0, ["quality", "det"], "no scene"),
        (0, ["det"], "no scene and no quality score"),
        (1, ["det"], "no quality score"),
        (1, [], "no quality score and no det score"),
    ],
)
@pytest.mark.parametrize("system", ["one-name", "one-name-as-coded"])
def test_a_store_that_lacks_something_is_pointed_to_faces_alone(tmp_path, system, scenes, scores, lacking):
    clips = [(split, identity, 1, scenes) for split in ("train", "val") for identity in (0, 0, 1, 1)]
    path = made_store(tmp_path / "store", clips, scores=scores)
    with pytest.raises(
        ValueError, match=f"store: has {lacking}, which {system} needs; --system face-only does without$"
    ):
        predict(path, tmp_path / "result.txt", system=system)
    assert names_in(tmp_path) == ["store"]
    predict(path, tmp_path / "result.txt", system="face-only", epochs=1)


@pytest.mark.parametrize("scores", [[], ["det"], ["quality"]])
def test_faces_alone_are_weighted_by_norms_where_scores_are_missing(tmp_path, scores):
    path = made_store(tmp_path / "store", [*TRAIN, ("val", 0, 3, 1), ("val", 1, 2, 1)], scores=scores)
    report = predict(path, tmp_path / "result.txt", system="face-only", epochs=1)
    missing = " and ".join(name for name in ("quality", "det") if name not in scores)
    assert f"without {missing} scores: norms weight the frames" in report.lines
    e, store = without_scores(SYSTEMS["face-only"]), ClipStore.open(path)
    found = retrieve(replace(e, data=str(path), training=replace(e.training, epochs=1)), store, device="cpu")
    clips = store.clips["clip"].to_numpy()[found.gallery]
    assert read_result(tmp_path / "result.txt")[1] == [list(clips[row[row >= 0]]) for row in found.ranking]


@pytest.mark.parametrize(
    "clips, message",
    [
        ([("val", 0, 1, 1), ("val", 1, 1, 1)], "no labelled train clip"),
        ([*TRAIN, ("val", 0, 0, 1)], "no val clip with 'face': nothing to rank"),
    ],
)
def test_a_store_with_nothing_to_train_or_rank_is_said(tmp_path, clips, message):
    with pytest.raises(ValueError, match=message):
        predict(made_store(tmp_path / "store", clips), tmp_path / "result.txt", **SHORT)
    assert names_in(tmp_path) == ["store"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"labelled_only": True}, "no labelled val clip, so labelled-only leaves no identity"),
        ({"split": "test"}, "no test clip with 'face': nothing to rank"),
    ],
)
def test_a_split_without_labels_or_clips_is_said(tmp_path, options, message):
    path = made_store(tmp_path / "store", [*TRAIN, ("val", -1, 1, 1)])
    with pytest.raises(ValueError, match=message):
        predict(path, tmp_path / "result.txt", **SHORT, **options)
    assert names_in(tmp_path) == ["store"]


@pytest.mark.parametrize(("table", "column", "old"), [("clips", "clip", "c4"), ("identities", "identity", "1")])
@pytest.mark.parametrize("command", [predict, partial(predict_shard, shard=1, shards=1)])
def test_a_name_that_no_result_can_hold_is_refused_before_the_training(
    tmp_path, monkeypatch, command, table, column, old
):
    store = made_store(tmp_path / "store", [*TRAIN, ("val", 0, 2, 1)])
    renamed(store, f"{table}.parquet", column, old, "Ann Lee")
    monkeypatch.setattr(retrieve_module, "train_members", lambda *_, **__: pytest.fail("trained for nothing"))
    with pytest.raises(ValueError, match=f"{column} 'Ann Lee'"):
        command(store, tmp_path / "result.txt", device="cpu")
    assert names_in(tmp_path) == ["store"]
