from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import made
from scipy import stats

from mmlib import records
from mmlib.ensemble import KINDS, member_clips
from mmlib.experiment import Experiment
from mmlib.retrieve import training_clips
from mmlib.studies import ensemble
from mmlib.studies.ensemble import MAIN, RULES

BASE = Experiment(profile="tiny", context=("scene",))


def record(kind="seeds", members=1, seed=0, ap=(0.5,), rule=MAIN, base=BASE, fit=1.0, **measures):
    combine, scale = RULES[rule]
    asked = replace(base, ensemble=kind, members=tuple(range(members)), seed=seed, combine=combine, scale=scale)
    measures = {"map_at_100": float(np.mean(ap))} | measures
    return made(asked, ap=list(ap), measures=measures, seconds={"fit": fit})


# -- the runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [[4, 1, 2], "[2, 4]", [2, 4]])
def test_sizes_are_ascending_and_have_one_member(asked):
    assert ensemble.as_sizes(asked) == [1, 2, 4]


@pytest.mark.parametrize("asked", ["[1, 2", [], [1], [0, 2], [2.0], "2 4", [True, 2]])
def test_sizes_that_are_no_sizes_are_refused(asked):
    with pytest.raises(ValueError, match="sizes must be"):
        ensemble.as_sizes(asked)


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


def test_worlds_are_made_smaller_never_larger_and_a_store_stays():
    assert ensemble.in_smaller_worlds(BASE, 50).settings == (("identities", 50),)
    assert ensemble.in_smaller_worlds(BASE, 60) == ensemble.in_smaller_worlds(BASE, 100) == BASE
    stored = replace(BASE, data="somewhere")
    assert ensemble.in_smaller_worlds(stored, 50) == stored


def test_records_are_grouped_by_what_their_members_are():
    bases = {
        "face and scene": BASE,
        "face alone": replace(BASE, context=()),
        "scene alone": replace(BASE, modality=None),
        "random start": replace(BASE, start="random"),
    }
    groups = ensemble.by_system([record(base=base) for base in bases.values()])
    assert list(groups) == list(bases)
    assert [len(group) for group in groups.values()] == [1, 1, 1, 1]


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


def test_sentence_on_blocks_names_the_most_uneven_ones():
    frame = pd.DataFrame(
        [(1, "as stored", 0.4), (2, "as stored", 0.6), (1, "principal axes", 0.9), (2, "principal axes", 0.1)],
        columns=["block", "axes", "share"],
    )
    text = ensemble.partition_sentence({"face": frame})
    assert text == (
        "A block of the face dimensions as stored holds 0.400 to 0.600 of the variance, "
        "the first block of principal axes 0.900."
    )


# -- identities lost -----------------------------------------------------------------------------------------


def test_expected_loss_of_small_cases_is_that_of_all_outcomes():
    # identities of one and two clips: a bootstrap of three misses the first with (2/3)^3, the second with (1/3)^3
    count = np.array([1, 2])
    assert ensemble.expected_lost(count, "bootstrap") == pytest.approx((8 / 27 + 1 / 27) / 2)
    # four of five clips are kept: only the identity of one clip can be lost, with 1/5
    assert ensemble.expected_lost(np.array([1, 4]), "80 % subsample") == pytest.approx(0.1)
    assert ensemble.expected_lost(count, "stratified bootstrap") == 0
    with pytest.raises(ValueError, match="procedure must be"):
        ensemble.expected_lost(count, "bagging")


@pytest.mark.parametrize("procedure", ensemble.PROCEDURES)
def test_draws_lose_what_is_expected(procedure):
    count = np.repeat([1, 2, 5, 20], [30, 20, 20, 5])
    identity = np.random.default_rng(1).permutation(np.repeat(100 + np.arange(len(count)), count))
    lost = ensemble.drawn_lost(identity, procedure, draws=300)
    expected = ensemble.expected_lost(count, procedure)
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
    assert row["expected"] == pytest.approx(ensemble.expected_lost(count[count > 0], "bootstrap"))
    assert row["low"] <= row["mean"] <= row["high"] and row["sd"] > 0


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
    assert frame["other"].tolist() == pytest.approx((frame["ap"] / 2).tolist())
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
    table = ensemble.lost_ap([single, single_seed, several, several_seed])
    row = table[(table["members"] == 1) & (table["lost by"] == "more than a quarter")].iloc[0]
    ap = np.linspace(0, 1, tiny[3])
    assert row["identities"] == len(lost[0])
    assert row["bagging"] == pytest.approx(ap[lost[0]].mean())  # every identity of a world has a labelled val clip
    assert row["difference"] == pytest.approx(100 * ap[lost[0]].mean() / 2)
    assert table[table["members"] == 3]["identities"].sum() == 20
    assert "one bag loses" in ensemble.lost_sentence(table).lower()


def test_nothing_is_said_of_losses_that_cannot_be_told(tiny):
    one, other, _ = bags(tiny, 1, train_clips=1)
    table = ensemble.lost_ap([one, other])
    assert table.empty
    assert ensemble.lost_sentence(table) == "Which member lost which identity cannot be said of these records."


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
def worlds():
    more = {"member_clip_top1": 0.6, "clip_top1": 0.7, "parameters": 3e6}
    differ = {"seeds": (0.1, 0.0), "views": (0.2, 0.0), "bagging": (0.4, 5.0)}
    return [
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
    ] + [
        record(kind, size, seed, [ap / 100 - off], rule)
        for rule, off in (("cosine", 0.02), ("softmax, temperature 1", 0.01))
        for (kind, size), values in POINTS.items()
        if size == 2 or kind == "seeds"
        for seed, ap in enumerate(values)
    ]


def test_ends_are_the_plain_model_and_every_kind_with_the_most_members(worlds):
    found = [(name, r.experiment["seed"]) for name, r in ensemble.ends(worlds)]
    kinds = ("seeds, 1", "seeds, 2", "views, 2", "bagging, 2")
    assert sorted(found) == sorted((name, seed) for name in kinds for seed in range(3))


def test_kinds_and_sizes_are_compared_with_the_plain_model(worlds):
    table = ensemble.by_members(worlds)
    assert list(zip(table["kind"], table["members"])) == [
        ("seeds", 1),
        ("seeds", 2),
        ("views", 1),
        ("views", 2),
        ("bagging", 1),
        ("bagging", 2),
    ]
    interval = stats.ttest_1samp([3, 3, 4], 0).confidence_interval(0.95)
    row = table.iloc[3]
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((10 / 3, *interval))
    assert table["difference"][0] == 0 and (row["n"], row["interval"]) == (3, "worlds")


def test_views_are_compared_with_as_many_seeds(worlds):
    table = ensemble.between_kinds(worlds).set_index("kind")
    assert table["difference"].to_dict() == pytest.approx({"views": 7 / 3, "seeds": 0, "bagging": -13 / 3})


def test_systems_are_compared_with_their_own_plain_model(worlds):
    other = [replace(r, ap=[r.ap[0] / 2]) for r in worlds]
    table = ensemble.by_system_and_members({"a": worlds, "b": other}).set_index(["system", "kind", "members"])
    assert table.loc[("b", "views", 2), "difference"] == pytest.approx(5 / 3)
    assert ensemble.by_system_and_members({}).empty


def test_rules_stand_beside_one_model_and_the_most_members(worlds):
    table = ensemble.by_rule(worlds)
    assert table.columns.tolist() == ["one model", "seeds", "views", "bagging"]
    assert table.index.tolist() == ["softmax", "softmax, temperature 1", "cosine"]
    assert table.loc["cosine"].tolist() == pytest.approx([0.48, 0.49, 1.6 / 3 - 0.02, 1.4 / 3 - 0.02])
    rules = ensemble.between_rules(worlds).set_index("rule")
    assert rules.loc["cosine", "difference"] == pytest.approx(-2)


def test_diversity_is_that_of_the_most_members(worlds):
    table = ensemble.diversity(worlds).set_index("kind")
    assert table.index.tolist() == ["views", "seeds", "bagging"]
    assert table.loc["bagging"].tolist() == pytest.approx([1.4 / 3, 0.6, 0.7, 0.4, 5, 6, 20])


# -- sentences -----------------------------------------------------------------------------------------------


def test_sentence_on_kinds_follows_the_intervals(worlds):
    text = ensemble.kinds_sentence(worlds)
    assert text.startswith("With 2 members, views are ahead of plain seeds, +2.33 points (+0.90 to +3.77);")
    assert "bagging is behind plain seeds, -4.33 points" in text
    assert "over one plain model, views +3.33 points (+1.90 to +4.77) and seeds +1.00 points" in text
    assert text.endswith("95 % intervals over 3 worlds.")
    turned = [replace(r, ap=[1 - r.ap[0]]) for r in worlds]
    assert "views are behind plain seeds, -2.33 points" in ensemble.kinds_sentence(turned)
    level = [
        replace(r, ap=[0.5 + 0.01 * (r.experiment["seed"] - 1) * (r.experiment["ensemble"] == "views")]) for r in worlds
    ]
    assert "views are not to be told apart from plain seeds, +0.00 points" in ensemble.kinds_sentence(level)


def test_sentence_on_starts_compares_as_many_members_and_one_model():
    def ran(start, gains):
        base = replace(BASE, start=start)
        return [
            record(
                kind, members, seed, (0.5 + gain + 0.01 * seed,), base=base, disagreement=0.1 if members == 1 else gain
            )
            for (kind, members), gain in gains.items()
            for seed in range(3)
        ]

    means = ran("class means", {("seeds", 1): 0.2, ("views", 1): 0.1, ("views", 2): 0.21, ("seeds", 2): 0.4})
    random = ran("random", {("seeds", 1): 0.15, ("views", 1): 0.0, ("views", 2): 0.24, ("views", 4): 0.3})
    text = ensemble.start_sentence(means, random)
    assert text == (
        "2 views that start at random change MAP@100 by +3.00 points (+3.00 to +3.00) against as many that start at class "
        "means, where one model that starts at random changes it by -5.00 points (-5.00 to -5.00); two of these views name "
        "24.0 % of the clips differently, two from class means 21.0 %; 95 % intervals over 3 worlds."
    )
    assert ensemble.start_sentence(means, []) == ""


def test_sentence_on_gains_has_every_kind_best_first(worlds):
    text = ensemble.gain_sentence(worlds)
    assert text.index("views +3.33") < text.index("seeds +1.00") < text.index("bagging -3.33")


def test_sentences_on_rules_have_their_numbers(worlds):
    assert "cosine -2.00 (-2.00 to -2.00)" in ensemble.rules_sentence(worlds)
    text = ensemble.flat_sentence(worlds)
    assert "temperature 1 reaches 0.5233, the average of cosines 0.5133" in text
    assert "by -1.00 points with all views, and by -1.00 with one model" in text


def test_sentence_on_diversity_begins_with_the_most_different(worlds):
    text = ensemble.diversity_sentence(ensemble.diversity(worlds))
    assert text.index("bagging 40.00 %, 0.6000 alone and 0.7000 together") < text.index("seeds 10.00 %")


def test_sentence_on_losses_has_the_challenge_and_these_clips(store):
    table = pd.DataFrame(
        [
            ("train", "bootstrap", 0.084, 0.08, 0.09, 0.03, 0, 1),
            ("train and val", "bootstrap", 0.021, 0, 0.02, 0.01, 0, 1),
        ],
        columns=["clips", "procedure", "challenge", "expected", "mean", "sd", "low", "high"],
    )
    assert ensemble.loss_sentence(table) == (
        "A bootstrap loses, drawn from train, 8.4 % of the challenge's identities and 9.0 % of these (standard deviation "
        "3.0 %); drawn from train and val, 2.1 % of the challenge's identities and 2.0 % of these (standard deviation 1.0 %)."
    )
