import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from mmlib import predict as module
from mmlib.clips.iqiyi import export_folder
from mmlib.clips.store import ClipStore
from mmlib.clips.truth import read_result, read_val_truth
from mmlib.metrics import official_score
from mmlib.predict import members_folder, predict
from mmlib.retrieval import retrieve
from mmlib.runs import run
from mmlib.systems import SYSTEMS, with_members

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
    expected = {store.identities[code]: [clips[row] for row in line if row >= 0]
                for code, line in zip(found.queries, found.ranking)}
    identities, ranked = read_result(tmp_path / "result.txt")
    assert dict(zip(identities, ranked)) == expected and len(identities) == len(expected)
    assert names_in(tmp_path) == ["result.txt"]


def test_official_score_of_the_result_is_the_map_of_the_record(store, tmp_path):
    predict(store.path, tmp_path / "result.txt", **SHORT)
    export_folder(store, tmp_path / "official")
    score = official_score(read_val_truth(tmp_path / "official/val_gt.txt"), read_result(tmp_path / "result.txt"))
    assert score.map_at_k == pytest.approx(run(asked(store, "one-name"), store, device="cpu").measures["map_at_100"], abs=1e-12)


def test_report_counts_what_is_missing(tmp_path):
    val = [("val", 0, 2, 1), ("val", 1, 1, 0), ("val", 1, 1, 0), ("val", 0, 0, 1), ("val", -1, 0, 0), ("val", 3, 1, 1)]
    # identity 2 has no clip in val and none in train, identity 3 none in train
    report = predict(made_store(tmp_path / "store", TRAIN + val, identities=4), tmp_path / "result.txt", **SHORT)
    assert report.lines()[:-1] == [
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
    assert predict(path, tmp_path / "result.txt", **SHORT).unlabelled == 2
    assert read_result(tmp_path / "result.txt") == (["0", "1"], [["c4"], ["c4"]])


def test_faces_alone_rank_no_clip_without_one(tmp_path):
    path = made_store(tmp_path / "store", [*TRAIN, ("val", 0, 1, 1), ("val", 1, 0, 1)])
    report = predict(path, tmp_path / "result.txt", system="face-only", epochs=1)
    assert report.lines()[2:4] == ["val: 2 clips, 1 ranked", "without face, not ranked: 1 clips"]
    assert read_result(tmp_path / "result.txt") == (["0", "1"], [["c4"], ["c4"]])


def test_simulated_clips_are_said_to_be(store, tmp_path):
    said = "simulated: no score on it is a result on the challenge"
    options = {"system": "face-only", "epochs": 1}
    assert predict(store.path, tmp_path / "one.txt", **options).lines()[-1] == said
    real = made_store(tmp_path / "store", [*TRAIN, ("val", 0, 1, 1)])
    assert said not in predict(real, tmp_path / "two.txt", **options).lines()


def test_a_store_named_simulated_is_a_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_store(tmp_path / "simulated", [*TRAIN, ("val", 0, 1, 1)])
    assert predict("simulated", "result.txt", system="face-only", epochs=1).ranked == 1


def test_seed_is_that_of_the_training(store, tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        predict(store.path, tmp_path / name, system="face-only", epochs=1, seed=seed)
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()


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
    assert (report.trained, report.loaded, report.kept) == (4, 0, members_folder(out))
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
    assert (report.trained, report.loaded, report.kept, report.foreign) == (0, 4, None, 0)
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
    assert (report.trained, report.loaded) == (0, 4) and report.lines()[2] == "test: 2 clips, 2 ranked"
    identities, ranked = read_result(out)
    assert identities == ["0", "1", "2"] and all(sorted(line) == ["c17", "c18"] for line in ranked)


@pytest.mark.parametrize("other", [{"seed": 1}, {"epochs": 2}, {"system": "one-name-as-coded"}])
def test_members_of_another_run_are_neither_used_nor_removed(small, kept, other):
    out, _, times = kept
    report = predict(small, out, **SHORT | {"members": 1} | other, overwrite=True)
    assert (report.trained, report.loaded, report.foreign) == (2, 0, 4)
    assert f"left in {members_folder(out)}: 4 members of other runs" in report.lines()
    assert times_in(members_folder(out)) == times


def test_members_of_another_library_are_not_used(small, kept, monkeypatch):
    monkeypatch.setattr(module, "library_hash", lambda: "another")
    report = predict(small, kept[0], **SHORT, overwrite=True)
    assert (report.trained, report.loaded, report.foreign) == (4, 0, 4)


def test_first_members_serve_a_larger_ensemble(small, kept):
    report = predict(small, kept[0], epochs=1, members=3, overwrite=True)
    assert (report.trained, report.loaded) == (2, 4)


def flip(content):
    """Change one byte in the middle, among the weights, which alone does not keep torch from reading them."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


class Call:
    def __reduce__(self):
        return os.mkdir, ("called",)


@pytest.mark.parametrize("spoil", [
    lambda content: content[:-1000], lambda content: b"", flip, lambda content: pickle.dumps(Call())])
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
        calls.append(target)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_third)
    with pytest.raises(OSError, match="No space left"):
        predict(small, tmp_path / "result.txt", **SHORT)
    assert names_in(tmp_path) == ["result.txt.members"]
    assert names_in(tmp_path / "result.txt.members") == sorted(path.name for path in calls[:2])


# -- refusals ------------------------------------------------------------------------------------------------


def test_a_result_that_exists_is_kept(small, tmp_path):
    (tmp_path / "result.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="result.txt: exists already"):
        predict(small, tmp_path / "result.txt")
    assert (tmp_path / "result.txt").read_text() == "mine" and names_in(tmp_path) == ["result.txt"]


@pytest.mark.parametrize("wrong, message", [
    ({"system": "two-name"}, "system must be one of one-name, one-name-as-coded, face-only, got 'two-name'"),
    ({"members": 17}, r"members must lie in \[1, 16\] for one-name, got 17"),
    ({"members": 2, "system": "face-only"}, r"members must lie in \[1, 1\] for face-only, got 2"),
    ({"split": "train"}, "split must be one of val, test, got 'train'"),
    ({"device": "tpu"}, "device must be auto, cpu or cuda, got 'tpu'")])
def test_wrong_arguments_are_named(small, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        predict(small, tmp_path / "result.txt", **wrong)
    assert names_in(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_said(small, tmp_path):
    with pytest.raises(ValueError, match="device cuda: there is no GPU here"):
        predict(small, tmp_path / "result.txt", device="cuda")


@pytest.mark.parametrize("scores, hint", [(["quality", "det"], "; --system face-only does without"), (["det"], "")])
def test_a_store_without_scenes_is_pointed_to_faces_alone(tmp_path, scores, hint):
    faces = [(split, identity, 1, 0) for split in ("train", "val") for identity in (0, 0, 1, 1)]
    path = made_store(tmp_path / "store", faces, scores=scores)
    with pytest.raises(ValueError, match=f"store: has no scene, which one-name needs{hint}$"):
        predict(path, tmp_path / "result.txt")
    assert names_in(tmp_path) == ["store"]


@pytest.mark.parametrize("clips, message", [
    ([("val", 0, 1, 1), ("val", 1, 1, 1)], "no labelled train clip"),
    ([*TRAIN, ("val", 0, 0, 1)], "no val clip with 'face': nothing to rank")])
def test_a_store_with_nothing_to_train_or_rank_is_said(tmp_path, clips, message):
    with pytest.raises(ValueError, match=message):
        predict(made_store(tmp_path / "store", clips), tmp_path / "result.txt", **SHORT)
    assert names_in(tmp_path) == ["store"]


@pytest.mark.parametrize("options, message", [
    ({"labelled_only": True}, "no labelled val clip, so labelled-only leaves no identity"),
    ({"split": "test"}, "no test clip with 'face': nothing to rank")])
def test_a_split_without_labels_or_clips_is_said(tmp_path, options, message):
    path = made_store(tmp_path / "store", [*TRAIN, ("val", -1, 1, 1)])
    with pytest.raises(ValueError, match=message):
        predict(path, tmp_path / "result.txt", **SHORT, **options)
    assert names_in(tmp_path) == ["store"]
