import hashlib
import os
import shutil

import numpy as np
import pandas as pd
import pytest

from mmlib.data.content import read_table
from mmlib.data.public import NORM, SETS, group_photographs, import_public, people_of, shared_names, split_clips
from mmlib.data.sources import known
from mmlib.experiment import Experiment, Training
from mmlib.retrieve import retrieve

REAL = os.environ.get("MMLIB_REAL_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="MMLIB_REAL_DATA names no folder with the tables of public faces")


def write_sums(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "SHA256SUMS"]
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}" for path in files
    ]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Small tables of the three sets: embeddings say the row, scenes the row of clips.csv."""
    folder, rng = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    people = [f"Person_{chr(65 + place // 26)}{chr(65 + place % 26)}" for place in range(40)]
    clips = [(f"{name}/{video}", name) for name in people for video in range(3 + (name > "Person_BA"))]
    tables = {
        "ytf": [(clip, frame, name) for clip, name in clips for frame in range(5)],
        "cfp": [(f"{n:03d}/{k}", 0, f"{n:03d}") for n in range(30) for k in range(14)],
        "lfw": [(f"{name}_{k:04d}", 0, name) for place, name in enumerate(people) for k in range(1 + place % 7)],
    }
    for name, rows in tables.items():
        (folder / name).mkdir()
        table = pd.DataFrame(rows, columns=["clip", "frame", "identity"])
        if name == "cfp":
            table["name"] = "Jo " + table["identity"].map(lambda code: people[int(code)])
        table["det"] = rng.uniform(0.98, 1, len(table)).astype(np.float32)
        table["quality"] = rng.uniform(0.1, 0.6, len(table)).astype(np.float32)
        table.to_parquet(folder / name / "frames.parquet")
        for network, dim in (("edgeface", 8), ("mobilefacenet", 4)):
            array = rng.normal(size=(len(table), dim))
            array[:, 0] = np.arange(len(table)) + (0.5 if network == "mobilefacenet" else 0)
            np.save(folder / name / f"{network}.npy", array.astype(np.float16))
    order = rng.permutation(len(clips))
    check = pd.DataFrame([clips[place] for place in order], columns=["clip", "identity"])
    check["label_check"] = 0.6
    check.loc[check["clip"].isin([f"{people[3]}/0", f"{people[3]}/1", f"{people[9]}/2"]), "label_check"] = 0.19
    check.rename_axis("row").to_csv(folder / "ytf/clips.csv")
    for place, kind in enumerate(("scene", "scene-whole")):
        np.save(folder / f"ytf/{kind}.npy", (np.arange(len(check))[:, None] + [0, place, 1]).astype(np.float16))
    write_sums(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of the small tables that a test may damage."""
    return shutil.copytree(written, tmp_path / "tables")


def rows_of(store):
    """Say of each frame of a store which row of the table it is, by its embedding."""
    return (given(store)[:, 0] + 0.25).astype(int)


def given(store):
    """Return the embeddings of a store as they were before their norms were changed."""
    return store.modalities["face"].feature.astype(float) / store.meta["provenance"]["times"]


def clips_of(store, table):
    """Say of each clip of a store what it was called and who is in it, by its first row."""
    first = rows_of(store)[store.modalities["face"].start]
    return table.iloc[first][["clip", "identity"]].reset_index(drop=True)


def test_a_store_of_videos_has_every_frame_with_its_scores(written, tmp_path):
    store = import_public("ytf", written, tmp_path / "store").store
    table, face, rows = read_table(written / "ytf/frames.parquet"), store.modalities["face"], rows_of(store)
    assert sorted(rows) == list(range(len(table)))
    np.testing.assert_allclose(given(store), np.load(written / "ytf/edgeface.npy")[rows], rtol=1e-3, atol=0.01)
    np.testing.assert_array_equal(face.columns["det"], table["det"][rows])
    np.testing.assert_array_equal(face.columns["frame"], table["frame"][rows])
    rank = table["quality"].rank()[rows]
    assert np.corrcoef(rank, pd.Series(face.columns["quality"]).rank())[0, 1] == pytest.approx(1)
    assert np.median(face.columns["quality"]) == pytest.approx(59, abs=1)
    assert (face.count == 5).all() and store.meta["provenance"]["quality"]["mapped"] == "by rank"


@pytest.mark.parametrize("scene, place", [("masked", 0), ("whole", 1)])
def test_every_clip_has_its_own_scene(written, tmp_path, scene, place):
    store = import_public("ytf", written, tmp_path / "store", scene=scene).store
    order = pd.read_csv(written / "ytf/clips.csv", index_col="clip")["row"]
    found, source = clips_of(store, read_table(written / "ytf/frames.parquet")), store.modalities["scene"]
    expected = order[found["clip"]].to_numpy()
    np.testing.assert_array_equal(source.feature[source.start], expected[:, None] + [0, place, 1])
    assert (source.count == 1).all()


def test_scenes_may_be_left_out(written, tmp_path):
    assert [*import_public("ytf", written, tmp_path / "store", scene=None).store.modalities] == ["face"]


@pytest.mark.parametrize("name", SETS)
def test_a_network_can_be_chosen(written, tmp_path, name):
    store = import_public(name, written, tmp_path / "store", network="mobilefacenet").store
    assert (abs(given(store)[:9, 0] % 1 - 0.5) < 0.4).any()
    assert store.modalities["face"].feature.shape[1] == 4


@pytest.mark.parametrize("seed", range(3))
def test_half_of_a_persons_clips_rounded_down_are_train_and_a_share_of_people_are_distractors(written, tmp_path, seed):
    store = import_public("ytf", written, tmp_path / "store", seed=seed).store
    found = clips_of(store, read_table(written / "ytf/frames.parquet"))
    code, split = store.clips["identity"], store.clips["split"]
    hidden = {*found["identity"][code < 0]}
    assert len(hidden) == 9  # 80 / 347 of 40
    assert {*store.identities} == {*found["identity"]} - hidden
    for person, rows in found.groupby("identity").groups.items():
        train = (split[rows] == "train").sum()
        assert train == (0 if person in hidden else len(rows) // 2)
        assert person in hidden or {*store.identities[code[rows]]} == {person}


@pytest.mark.parametrize("name", SETS)
def test_the_median_norm_is_the_challenges_and_angles_stay(written, tmp_path, name):
    report = import_public(name, written, tmp_path / "store")
    feature, table = report.store.modalities["face"].feature.astype(float), np.load(written / name / "edgeface.npy")
    norm = np.linalg.norm(feature, axis=1)
    assert np.median(norm) == pytest.approx(22, rel=1e-3) == NORM
    before = table[rows_of(report.store)].astype(float)
    np.testing.assert_allclose(
        feature / norm[:, None], before / np.linalg.norm(before, axis=1, keepdims=True), atol=1e-3
    )
    factor = 22 / np.median(np.linalg.norm(table.astype(float), axis=1))
    assert f"embeddings times {factor:.4g}, so that their median norm is 22" in report.lines()


def test_names_tell_nothing_of_the_person_and_the_kind_of_clip():
    identity = pd.Series(np.repeat([f"{person:03d}" for person in range(300)], 4), [f"c{i:04d}" for i in range(1200)])
    split = split_clips(identity, 0)
    number = split["clip"].str[-5:].astype(int)
    assert abs(np.corrcoef(number, identity[split.index].astype(int))[0, 1]) < 0.12  # sd 0.03 over 1,200 clips
    for kind in (split["split"] == "train", split["identity"].isna()):
        assert abs(np.corrcoef(number, kind)[0, 1]) < 0.12


def test_the_seed_draws_the_split_whatever_the_order_of_the_table():
    identity = pd.Series(np.repeat(list("abcdefgh"), 4), [f"c{i:02d}" for i in range(32)])
    pd.testing.assert_frame_equal(split_clips(identity, 1), split_clips(identity.sample(frac=1, random_state=0), 1))
    assert len({tuple(split_clips(identity, seed)["split"]) for seed in range(10)}) == 10


def test_a_person_with_one_clip_is_a_distractor():
    split = split_clips(pd.Series({"a": "ann", "b": "bob", "c": "bob"}), 0)  # too few for a share of strangers
    assert split["split"]["a"] == "val" and sorted(split["split"][["b", "c"]]) == ["train", "val"]
    assert split["identity"].isna().tolist() == [True, False, False]


def test_suspects_are_named_and_kept(written, tmp_path):
    report = import_public("ytf", written, tmp_path / "store")
    said, table = report.store.meta["provenance"]["suspects"], read_table(written / "ytf/frames.parquet")
    assert said["kept"] and sorted(said["clips"]) == ["Person_AD/0", "Person_AD/1", "Person_AJ/2"]
    found = clips_of(report.store, table)
    names = dict(zip(found["clip"], report.store.clips["clip"]))
    assert all(names[old] == new for old, new in said["clips"].items())
    assert any("3 clips, kept: Person_A" in line for line in report.lines())


def test_suspects_can_be_left_out_of_the_same_split(written, tmp_path):
    stores = [
        import_public("ytf", written, tmp_path / f"{kept}", suspects=kept, seed=1).store for kept in (True, False)
    ]
    table = read_table(written / "ytf/frames.parquet")
    found = [
        clips_of(store, table).assign(split=store.clips["split"], code=store.clips["identity"]) for store in stores
    ]
    assert {*found[0]["clip"]} - {*found[1]["clip"]} == {"Person_AD/0", "Person_AD/1", "Person_AJ/2"}
    whole, rest = (
        each[~each["identity"].isin(["Person_AD", "Person_AJ"])].set_index("clip").sort_index() for each in found
    )
    assert (whole["split"] == rest["split"]).all() and ((whole["code"] < 0) == (rest["code"] < 0)).all()
    one = found[1][found[1]["identity"] == "Person_AD"]  # one clip is left
    assert one["split"].tolist() == ["val"] and one["code"].tolist() == [-1]
    assert not any(stores[1].meta["provenance"]["suspects"]["clips"].values())


@pytest.mark.parametrize("name", ["cfp", "lfw"])
def test_a_clip_of_photographs_is_different_ones_of_one_person(written, tmp_path, name):
    store = import_public(name, written, tmp_path / "store").store
    table, rows, face = read_table(written / name / "frames.parquet"), rows_of(store), store.modalities["face"]
    assert sorted(rows) == list(range(len(table)))
    for start, count, code in zip(face.start, face.count, store.clips["identity"]):
        who = {*table["name" if name == "cfp" else "identity"][rows[start : start + count]]}
        assert len(who) == 1 and (code < 0 or who.pop().replace(" ", "_") == store.identities[code])
        assert face.columns["frame"][start : start + count].tolist() == list(range(count))
    assert store.meta["provenance"]["set"] == known()[name].title and "scene" not in store.modalities


def test_a_share_of_the_people_of_photographs_are_distractors_in_val():
    names = np.repeat([f"{person:03d}" for person in range(100)], 14)
    plain, table = group_photographs(names, 0), group_photographs(names, 0, 0.23)
    hidden = {*names[table["identity"].isna()]}
    assert len(hidden) == 23 and plain["identity"].notna().all()
    assert {*table["split"][np.isin(names, [*hidden])]} == {"val"}
    assert table.groupby("clip").size().between(2, 5).all()


def test_one_seed_makes_one_store(written, tmp_path):
    for name in SETS:
        stores = [import_public(name, written, tmp_path / f"{name}{n}", seed=n // 2).store for n in range(3)]
        assert stores[0].fingerprint == stores[1].fingerprint != stores[2].fingerprint


def test_a_store_can_be_trained_on(written, tmp_path):
    store = import_public("ytf", written, tmp_path / "store").store
    training = Training(epochs=1, batch=16, frames=2)
    for classifier, aggregator in (("class means", "quality"), ("linear", "NAN + scores")):
        e = Experiment(data=str(store.path), classifier=classifier, aggregator=aggregator, training=training)
        assert 0 < retrieve(e, store, device="cpu").ap.mean() <= 1


@pytest.mark.parametrize("file", ["frames.parquet", "edgeface.npy", "clips.csv", "scene.npy"])
def test_a_file_that_is_not_the_one_listed_is_refused(folder, tmp_path, file):
    with open(folder / "ytf" / file, "ab") as stream:
        stream.write(b" ")
    listed = hashlib.sha256((folder / "ytf" / file).read_bytes()[:-1]).hexdigest()
    with pytest.raises(ValueError, match=f"{file}: its sha256 is [0-9a-f]{{64}}, but SHA256SUMS lists {listed}"):
        import_public("ytf", folder, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_files_that_are_not_listed_are_said(folder, tmp_path):
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(line.replace("  ", " *") for line in lines if "scene.npy" not in line))
    assert "not in SHA256SUMS: ytf/scene.npy" in import_public("ytf", folder, tmp_path / "store").lines()
    (folder / "SHA256SUMS").unlink()
    lines = import_public("lfw", folder, tmp_path / "store", overwrite=True).lines()
    assert "not in SHA256SUMS: lfw/frames.parquet, lfw/edgeface.npy" in lines


def test_a_line_that_is_no_sum_is_named(folder, tmp_path):
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  a\nabc  ytf/scene.npy\n")
    with pytest.raises(ValueError, match="SHA256SUMS, line 2: 'abc"):
        import_public("ytf", folder, tmp_path / "store")


def change_table(folder, **columns):
    path = folder / "ytf/frames.parquet"
    read_table(path).assign(**columns).to_parquet(path)


def frames_of(folder):
    return len(read_table(folder / "ytf/frames.parquet"))


def change_clips(folder, change):
    path = folder / "ytf/clips.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "ytf/scene.npy").unlink(), "ytf/scene.npy: missing"),
        (lambda folder: np.save(folder / "ytf/edgeface.npy", np.ones((9, 8), "f2")), "edgeface.npy: 9 rows, but .*"),
        (lambda folder: np.save(folder / "ytf/scene.npy", np.ones((9, 8), "f2")), "scene.npy: 9 rows, but .*clips.csv"),
        (
            lambda folder: np.save(folder / "ytf/edgeface.npy", np.zeros((frames_of(folder), 8), "f2")),
            "edgeface.npy: the median norm of its [0-9]+ rows is 0",
        ),
        (lambda folder: change_table(folder, identity=None), "frames.parquet, row 1: clip Person_AA/0 has no identity"),
        (lambda folder: change_table(folder, identity="a b"), "row 1: clip Person_AA/0: identity is 'a b'"),
        (lambda folder: change_table(folder, quality=np.nan), "row 1: clip Person_AA/0: quality is nan"),
        (lambda folder: change_table(folder, det=np.inf), "row 1: clip Person_AA/0: det is inf"),
        (lambda folder: change_table(folder, frame=1), "clip Person_AA/0 has frame 1 and 1"),
        (
            lambda folder: (
                read_table(folder / "ytf/frames.parquet")
                .drop(columns="quality")
                .to_parquet(folder / "ytf/frames.parquet")
            ),
            "frames.parquet: no column quality",
        ),
        (lambda folder: change_clips(folder, lambda clips: clips[1:]), "clips.csv: clip Person.* stands 0 times"),
        (lambda folder: change_clips(folder, lambda clips: pd.concat([clips, clips[:1]])), "clips.csv: .* 2 times"),
        (lambda folder: change_clips(folder, lambda clips: clips.assign(label_check="x")), "clips.csv: not a readable"),
        (lambda folder: change_clips(folder, lambda clips: clips[["clip"]]), "clips.csv: not a readable"),
    ],
)
def test_tables_that_cannot_be_are_refused_with_file_and_place(folder, tmp_path, damage, message):
    damage(folder)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=message):
        import_public("ytf", folder, tmp_path / "store")
    assert not [path for path in tmp_path.iterdir() if "store" in path.name]


@pytest.mark.parametrize(
    "name, options",
    [
        ("imdb", {}),
        ("ytf", {"network": "arcface"}),
        ("ytf", {"scene": "half"}),
        ("lfw", {"suspects": False}),
        ("cfp", {"scene": "whole"}),
    ],
)
def test_what_is_not_known_is_refused(written, tmp_path, name, options):
    with pytest.raises(ValueError, match=name):
        import_public(name, written, tmp_path / "store", **options)


def test_names_are_shared_by_their_letters():
    names = ["Jean_Chretien", "Ann-Lee", "50 Cent", "Bob", "J.P. O'Neil"]
    others = ["JEAN CHRETIEN", "annlee", "Ann_Lee", "Cent", "Eve", "jp_oneil"]
    assert shared_names(names, others) == [
        ("50 Cent", "Cent"),
        ("Ann-Lee", "Ann_Lee"),
        ("Ann-Lee", "annlee"),
        ("J.P. O'Neil", "jp_oneil"),
        ("Jean_Chretien", "JEAN CHRETIEN"),
    ]


def test_names_are_shared_without_accents_and_middle_initials():
    names = ["José_Núñez", "George_W_Bush", "George_H.W._Bush", "E_Clay_Shaw", "Strauß", "Ann_B_Lee", "Jay Z"]
    others = ["jose nunez", "GEORGE BUSH", "Clay Shaw", "STRAUSS", "Ann C. Lee", "Jay", "Anna Lee"]
    assert shared_names(names, others) == [
        ("Ann_B_Lee", "Ann C. Lee"),
        ("George_H.W._Bush", "GEORGE BUSH"),
        ("George_W_Bush", "GEORGE BUSH"),
        ("José_Núñez", "jose nunez"),
        ("Strauß", "STRAUSS"),
    ]
    assert shared_names(others, names) == sorted((b, a) for a, b in shared_names(names, others))


def test_people_of_a_set_have_their_names(written):
    assert people_of("cfp", written)[:2] == ["Jo_Person_AA", "Jo_Person_AB"]
    assert len(people_of("lfw", written)) == 40


@pytest.mark.parametrize("number", [4, 5, 6, 7, 9, 11, 12, 20, 23, 41])
def test_half_the_photographs_go_to_train_in_clips_of_two_to_five(number):
    for seed in range(5):
        table = group_photographs(["ann"] * number, seed)
        assert (table["split"] == "train").sum() == (number + 1) // 2
        assert table.groupby("clip").size().between(2, 5).all()
        assert (table.groupby("clip")["split"].nunique() == 1).all() and (table["identity"] == "ann").all()
        for _, frame in table.groupby("clip")["frame"]:
            assert sorted(frame) == list(range(len(frame)))


def test_the_number_of_clips_varies_and_photographs_are_shuffled():
    tables = [group_photographs(["ann"] * 20, seed) for seed in range(20)]
    assert {table["clip"].nunique() for table in tables} > {5, 6, 7}
    assert len({tuple(table["split"]) for table in tables}) == 20


@pytest.mark.parametrize("number", [1, 2, 3])
def test_too_few_photographs_make_one_distractor(number):
    table = group_photographs(["ann"] * 4 + ["bob"] * number, 0)[4:]
    assert table["clip"].nunique() == 1 and set(table["split"]) == {"val"} and table["identity"].isna().all()


def test_rows_of_the_grouping_are_those_of_the_names():
    names = np.random.default_rng(0).permutation(["ann"] * 7 + ["bob"] * 4 + ["eve"] * 4)
    table = group_photographs(names, 0)
    assert table["identity"].tolist() == names.tolist() and table.index.tolist() == list(range(15))


def test_the_same_seed_groups_alike():
    names = ["ann"] * 9 + ["bob"] * 8
    pd.testing.assert_frame_equal(group_photographs(names, 3), group_photographs(names, 3))
    assert not group_photographs(names, 3).equals(group_photographs(names, 4))


def test_the_number_of_a_clip_tells_nothing_of_its_identity():
    table = group_photographs(np.repeat([f"{person:03d}" for person in range(300)], 4), 0)
    number = table["clip"].str[-5:].astype(int)
    assert abs(np.corrcoef(number, table["identity"].astype(int))[0, 1]) < 0.15  # sd 0.04 over 600 clips


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """Make the store of a set, with the options given."""

    def make(name, **options):
        return import_public(name, REAL, tmp_path_factory.mktemp("real") / "store", **options)

    return make


@needs_real
@pytest.mark.parametrize(
    "name, frames, clips, identities, strangers",
    [("ytf", 5770, 1154, 267, 80), ("cfp", 7000, None, 385, 115), ("lfw", 7701, None, 439, 3842)],
)
def test_real_tables_become_stores(real, name, frames, clips, identities, strangers):
    report = real(name, seed=3)
    store = report.store
    people, nobody = people_of(name, REAL), store.select("val", labelled=False)
    assert store.modalities["face"].feature.shape == (frames, 512) and len(store) == (clips or len(store))
    assert len(store.identities) == identities and len(people) - identities == strangers
    assert report.untrained == [] and len(store.select("train", labelled=False)) == 0 < len(nobody)
    assert "sha256 of every file as listed" in report.lines()
    assert {*store.identity_of(store.select("val", labelled=True))} == {*range(identities)}
    if name == "ytf":
        assert any("29 clips, kept" in line for line in report.lines())
        assert store.modalities["scene"].feature.shape == (1154, 1280)


@needs_real
def test_real_suspects_can_be_left_out(real):
    store = real("ytf", suspects=False).store
    assert len(store) == 1154 - 29
    assert store.modalities["face"].feature.shape == (5770 - 5 * 29, 512)


@needs_real
@pytest.mark.parametrize("network, low, high", [("edgeface", 0.93, 0.985), ("mobilefacenet", 0.88, 0.95)])
def test_real_clips_are_found_as_well_as_was_measured(real, network, low, high):
    store = real("ytf", network=network).store
    found = {}
    for aggregator in ("mean", "norm", "quality"):
        e = Experiment(data=str(store.path), classifier="class means", aggregator=aggregator)
        found[aggregator] = retrieve(e, store, device="cpu").ap.mean()
    assert all(low < value < high for value in found.values()), found
    e = Experiment(data=str(store.path), classifier="linear", aggregator="NAN + scores", training=Training(epochs=2))
    assert 0.5 < retrieve(e, store, device="cpu").ap.mean() <= 1


@needs_real
def test_real_names_are_shared_as_counted():
    people = {name: people_of(name, REAL) for name in SETS}
    pairs = {("ytf", "lfw"): 264, ("ytf", "cfp"): 23, ("lfw", "cfp"): 156}
    assert {of: len(shared_names(*(people[name] for name in of))) for of in pairs} == pairs
    assert {name: len(names) for name, names in people.items()} == {"ytf": 347, "cfp": 500, "lfw": 4281}
