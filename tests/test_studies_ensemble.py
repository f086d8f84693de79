from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import made
from scipy import stats

from mmlib import metrics, records
from mmlib.ensemble import KINDS, member_clips
from mmlib.experiment import Experiment
from mmlib.retrieve import training_clips
from mmlib.studies import ensemble
from mmlib.studies.ensemble import MAIN, RULES

BASE = Experiment(profile="tiny", context=("scene",))


def record(kind="seeds", members=1, seed=0, ap=(0.5,), rule=MAIN, base=BASE, fit=1.0, **measures):
    asked = replace(base, ensemble=kind, members=tuple(range(members)), seed=seed, **RULES[rule])
    measures = {"map_at_100": float(np.mean(ap)), "disagreement": 0.0} | measures
    return made(asked, ap=list(ap), measures=measures, seconds={"fit": fit})


# -- the runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [[4, 1, 2], [2, 4]])
def test_sizes_are_planned_in_order_and_one_member_always(asked):
    sizes = [len(e.members) for e in ensemble.plan(BASE, ["views"], asked, [0], rules=[MAIN])]
    assert sizes == [1, 2, 4]


@pytest.mark.parametrize("asked", [[], [1], [0, 2]])
def test_sizes_that_are_no_ensemble_are_refused(asked):
    with pytest.raises(ValueError, match="sizes must be"):
        ensemble.plan(BASE, KINDS, asked, [0])


def test_plan_has_every_size_by_the_main_rule_and_the_rest_where_it_is_read():
    asked = ensemble.plan(BASE, ("seeds", "views"), [1, 2, 4], [7])
    found = {(e.ensemble, len(e.members), e.combine, e.scale) for e in asked}
    assert len(asked) == len(found) == 2 * 3 + 4 * (2 + 1)
    assert {(size, kind) for kind, size, *rule in found if tuple(rule) == ("cosine", 30.0)} == {
        (1, "seeds"),
        (4, "seeds"),
        (4, "views"),
    }
    assert {e.seed for e in asked} == {7}


def test_plan_trains_every_member_once():
    asked = ensemble.plan(BASE, KINDS, [1, 2, 4], [0, 1])
    assert len({(e.branch(), member) for e in asked for member in e.members}) == 4 * 4 * 2


def test_runs_are_named_by_what_their_members_are():
    bases = {
        "face and scene": BASE,
        "face alone": replace(BASE, context=()),
        "scene alone": replace(BASE, modality=None),
        "random start": replace(BASE, start="random"),
    }
    runs = ensemble.as_runs(record("views", 2, base=base, rule="ranks") for base in bases.values())
    assert runs["system"].tolist() == list(bases)
    assert runs[["kind", "members", "rule", "arm"]].values.tolist() == [["views", 2, "ranks", "views, 2"]] * 4


# -- the partition -------------------------------------------------------------------------------------------


def test_partition_has_the_discarded_block_of_each_member():
    frame = ensemble.partition(2048, 32, 16)
    assert frame.iloc[-1].tolist() == [15, 15 * 64, 16 * 64, 2048]
    assert (frame["stop"] - frame["start"]).unique().tolist() == [64]


def test_blocks_share_the_variance_of_stored_dimensions(store):
    shares = ensemble.block_variance(store, "face", 16, frames=200).pivot(index="block", columns="axes", values="share")
    assert shares.sum().tolist() == pytest.approx([1, 1])
    assert shares["principal axes"].is_monotonic_decreasing
    x = np.asarray(store.modalities["face"].feature, np.float64)
    x = x[np.sort(np.random.default_rng(0).permutation(len(x))[:200])]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    variance = x.var(0)
    assert shares["as stored"][3] == pytest.approx(variance[64:96].sum() / variance.sum(), rel=1e-3)
    # 200 frames span 199 dimensions about their mean, so nothing is left from block 8 on
    assert shares["principal axes"][8:].max() < 1e-6


# -- identities lost -----------------------------------------------------------------------------------------


def test_expected_loss_of_small_cases_is_that_of_all_outcomes():
    # identities of one and two clips: a bootstrap of three misses the first with (2/3)^3, the second with (1/3)^3
    count = np.array([1, 2])
    assert ensemble.expected_lost(count)["bootstrap"] == pytest.approx((8 / 27 + 1 / 27) / 2)
    # four of five clips are kept: only the identity of one clip can be lost, with 1/5
    assert ensemble.expected_lost(np.array([1, 4]))["80 % subsample"] == pytest.approx(0.1)
    assert ensemble.expected_lost(count)["stratified bootstrap"] == 0


@pytest.mark.parametrize("procedure", ensemble.PROCEDURES)
def test_draws_lose_what_is_expected(procedure):
    count = np.repeat([1, 2, 5, 20], [30, 20, 20, 5])
    identity = np.random.default_rng(1).permutation(np.repeat(100 + np.arange(len(count)), count))
    lost = ensemble.drawn_lost(identity, procedure, draws=300)
    expected = ensemble.expected_lost(count)[procedure]
    assert len(lost) == 300
    assert lost.mean() == pytest.approx(expected, abs=4 * stats.sem(lost) + 1e-12)  # four standard errors of the mean


def test_challenge_column_has_the_published_shares(store):
    table = ensemble.lost_table(store, draws=3).set_index(["clips", "procedure"])["challenge"]
    # stated beside the joint table of clips an identity (reference): 8.4 and 3.6 % of train, 2.1 and 0.5 % of all
    assert table["train"].round(3).tolist() == [0.084, 0.036, 0]
    assert table["train and val"].round(3).tolist() == [0.021, 0.005, 0]


def test_store_columns_count_labelled_clips_with_a_face(store):
    row = ensemble.lost_table(store, draws=5).iloc[0]
    clips = store.select("train", labelled=True, having="face")
    count = np.bincount(store.identity_of(clips))
    assert row["expected"] == pytest.approx(ensemble.expected_lost(count[count > 0])["bootstrap"])
    assert row["min"] <= row["mean"] <= row["max"] and row["std"] > 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The world that records of ``BASE`` are of, as a store; its training clips and queries."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MMLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
    base = replace(BASE, settings=(("identities", 20),))
    store = records.open_store(base)
    patch.undo()
    clips = training_clips(base, store)
    return base, clips, store.identity_of(clips), len(np.unique(store.identity_of(store.select("val", labelled=True))))


def bags(tiny, members, **known):
    base, clips, identity, queries = tiny
    kept = [
        np.unique(identity[np.searchsorted(clips, member_clips("bagging", clips, identity, seed=0, member=m))])
        for m in range(members)
    ]
    lost = [np.setdiff1d(identity, k) for k in kept]
    known = {"train_clips": len(clips), "lost_identities": float(np.mean([len(x) for x in lost]))} | known
    ap = np.linspace(0, 1, queries)
    one = record("bagging", members, base=base, ap=ap, **known)
    return one, record("seeds", members, base=base, ap=ap / 2, train_clips=len(clips)), lost


def test_lost_identities_are_found_again_from_clips_and_seed(tiny):
    one, other, lost = bags(tiny, 3)
    frame = ensemble.lost_by(one, other)
    expected = pd.Series(np.concatenate(lost)).value_counts()
    assert sum(map(len, lost)) > 0
    assert frame[frame["lost"] > 0].set_index("identity")["lost"].to_dict() == expected.to_dict()
    assert frame["seeds"].tolist() == pytest.approx((frame["bagging"] / 2).tolist())
    assert frame["clips"].sum() == len(tiny[1])


def test_records_of_other_clips_are_not_read_as_of_these(tiny):
    for changed in ({"lost_identities": 0.1}, {"train_clips": 3}):
        one, other, _ = bags(tiny, 3, **changed)
        assert ensemble.lost_by(one, other) is None
    one, other, _ = bags(tiny, 3)
    assert ensemble.lost_by(replace(one, ap=one.ap[1:]), other) is None


def test_what_a_lost_identity_costs_is_measured_on_the_same_identities(tiny):
    single, single_seed, lost = bags(tiny, 1)
    several, several_seed, _ = bags(tiny, 3)
    table = ensemble.lost_ap(ensemble.as_runs([single, single_seed, several, several_seed]))
    row = table[(table["members"] == 1) & (table["lost by"] == "more than a quarter")].iloc[0]
    ap = np.linspace(0, 1, tiny[3])
    assert row["identities"] == len(lost[0])
    assert row["bagging"] == pytest.approx(ap[lost[0]].mean())  # every identity of a world has a labelled val clip
    assert row["difference"] == pytest.approx(100 * ap[lost[0]].mean() / 2)
    kept = np.setdiff1d(np.arange(len(ap)), lost[0])
    row = table[(table["members"] == 1) & (table["lost by"] == "no member")].iloc[0]
    interval = metrics.bootstrap_interval(ap[kept] - ap[kept] / 2)
    assert (row["low"], row["high"]) == pytest.approx([100 * bound for bound in interval])
    assert (row["n"], row["interval"]) == (len(kept), "identities")
    assert table[table["members"] == 3]["identities"].sum() == 20


def test_seeds_on_one_store_are_averaged_identity_by_identity(bare, monkeypatch):
    base = replace(BASE, data=str(bare.path), context=())
    aps = {("bagging", 0): (0.2, 0.4), ("bagging", 1): (0.6, 0.8), ("seeds", 0): (0.5, 0.5), ("seeds", 1): (0.5, 0.7)}
    runs = ensemble.as_runs(record(kind, 2, seed, ap, base=base) for (kind, seed), ap in aps.items())
    part = {
        0: [(0, 1, 0.2, 0.5), (1, 0, 0.4, 0.5)],
        1: [(0, 1, 0.6, 0.5), (1, 1, 0.8, 0.7)],
    }  # seed 0 lost identity 0 alone
    frames = {
        seed: pd.DataFrame(rows, columns=["identity", "lost", "bagging", "seeds"]).assign(clips=1)
        for seed, rows in part.items()
    }
    monkeypatch.setattr(ensemble, "lost_by", lambda one, other: frames[one.experiment["seed"]])
    table = ensemble.lost_ap(pd.concat([runs, runs.assign(members=1)]))
    row = table[(table["members"] == 2) & (table["lost by"] == "more than a quarter")].iloc[0]
    assert (row["identities"], row["bagging"], row["seeds"]) == pytest.approx((1.5, (0.4 + 0.8) / 2, (0.5 + 0.7) / 2))
    assert (row["n"], row["interval"]) == (2, "identities")


def test_nothing_is_said_of_losses_that_cannot_be_told(tiny):
    one, other, _ = bags(tiny, 1, train_clips=1)
    assert ensemble.lost_ap(ensemble.as_runs([one, other])).empty


# -- members, kinds, rules -----------------------------------------------------------------------------------

POINTS = {
    ("seeds", 1): [50, 60, 40],
    ("seeds", 2): [51, 60, 42],
    ("views", 1): [49, 58, 41],
    ("views", 2): [53, 63, 44],
    ("bagging", 1): [40, 50, 30],
    ("bagging", 2): [45, 57, 38],
}


@pytest.fixture
def runs():
    more = {"member_clip_top1": 0.6, "clip_top1": 0.7, "parameters": 3e6}
    differ = {"seeds": (0.1, 0.0), "views": (0.2, 0.0), "bagging": (0.4, 5.0)}
    main = [
        record(
            kind,
            size,
            seed,
            [ap / 100],
            fit=10.0 * (seed + 1),
            disagreement=differ[kind][0],
            lost_identities=differ[kind][1],
            **more,
        )
        for (kind, size), values in POINTS.items()
        for seed, ap in enumerate(values)
    ]
    return ensemble.as_runs(
        main
        + [
            record(kind, size, seed, [ap / 100 - off], rule)
            for rule, off in (("cosine", 0.02), ("softmax, temperature 1", 0.01))
            for (kind, size), values in POINTS.items()
            if size == 2 or kind == "seeds"
            for seed, ap in enumerate(values)
        ]
    )


def test_kinds_and_sizes_are_compared_with_the_plain_model(runs):
    table = ensemble.by_members(runs)
    assert list(zip(table["kind"], table["members"])) == list(POINTS)
    interval = stats.ttest_1samp([3, 3, 4], 0).confidence_interval(0.95)
    row = table.iloc[3]
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((10 / 3, *interval))
    assert table["difference"][0] == 0 and (row["n"], row["interval"]) == (3, "worlds")


def test_views_are_compared_with_as_many_seeds(runs):
    table = ensemble.against(ensemble.most(runs), "kind", "seeds").set_index("kind")
    assert table["difference"].to_dict() == pytest.approx({"views": 7 / 3, "seeds": 0, "bagging": -13 / 3})


def test_systems_are_compared_with_their_own_plain_model(runs):
    halved = [replace(each, ap=[each.ap[0] / 2]) for each in runs["record"]]
    both = pd.concat([runs, runs.assign(system="another", record=halved)])
    table = ensemble.by_members(both).set_index(["system", "kind", "members"])
    assert table.loc[("another", "views", 2), "difference"] == pytest.approx(5 / 3)
    assert table.loc[("face and scene", "views", 2), "difference"] == pytest.approx(10 / 3)


def test_the_most_members_are_those_of_each_system(runs):
    fewer = runs[runs["members"] == 1].assign(system="another")
    last = ensemble.most(pd.concat([runs, fewer]))
    assert last.groupby("system")["members"].unique().map(list).to_dict() == {"another": [1], "face and scene": [2]}


def test_rules_stand_beside_one_model_and_the_most_members(runs):
    table = ensemble.by_rule(runs)
    assert table.columns.tolist() == ["one model", "seeds", "views", "bagging"]
    assert table.index.tolist() == ["softmax", "softmax, temperature 1", "cosine"]
    assert table.loc["cosine"].tolist() == pytest.approx([0.48, 0.49, 1.6 / 3 - 0.02, 1.4 / 3 - 0.02])
    views = runs[(runs["kind"] == "views") & (runs["members"] == 2)]
    rules = ensemble.against(views, "rule", MAIN).set_index("rule")
    assert rules.loc["cosine", "difference"] == pytest.approx(-2)


def test_starts_are_compared_for_one_model_and_for_as_many_members():
    def ran(start, gains):
        return [
            record(kind, members, seed, [0.5 + gain], base=replace(BASE, start=start), disagreement=gain)
            for (kind, members), gain in gains.items()
            for seed in range(2)
        ]

    means = ran("class means", {("seeds", 1): 0.2, ("views", 1): 0.1, ("views", 2): 0.21, ("seeds", 2): 0.4})
    random = ran("random", {("seeds", 1): 0.15, ("views", 1): 0.0, ("views", 2): 0.24, ("views", 4): 0.3})
    table = ensemble.starts(ensemble.as_runs(means + random)).set_index(["models", "start"])
    assert table["difference"].to_dict() == pytest.approx(
        {
            ("one model", "random"): -5,
            ("one model", "class means"): 0,
            ("2 views", "random"): 3,
            ("2 views", "class means"): 0,
        }
    )
    assert table.loc["2 views", "disagreement"].to_dict() == pytest.approx({"random": 0.24, "class means": 0.21})
    alone = ensemble.starts(ensemble.as_runs(means))
    assert set(alone["start"]) == {"class means"}


def test_diversity_is_that_of_the_most_members(runs):
    table = ensemble.diversity(runs).set_index("kind")
    assert table.index.tolist() == ["views", "seeds", "bagging"]
    assert table.loc["bagging"].tolist() == pytest.approx([1.4 / 3, 0.6, 0.7, 0.4, 5, 6, 20])
