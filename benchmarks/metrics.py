"""Time scoring at full scale and ranking at a tenth of it: python benchmarks/metrics.py"""

from time import perf_counter

import numpy as np
import pandas as pd
import torch

from mmlib import metrics, rank

IDENTITIES, CLIPS, LABELLED, DIM, K = 10_034, 76_013, 45_472, 512, 100  # the val split of iQIYI-VID-2019
REPEATS = 3


def seconds(function) -> float:
    """Best wall time of a few calls, in seconds."""
    times = []
    for _ in range(REPEATS):
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return min(times)


def ranking_problem(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a gallery (CLIPS,) and a ranking (IDENTITIES, K) without repeats, with hits at random ranks."""
    gallery = np.full(CLIPS, -1)
    gallery[:LABELLED] = rng.permutation(np.arange(LABELLED) % IDENTITIES)
    rng.shuffle(gallery)
    # Steps of a stride that shares no factor with CLIPS never meet the same clip twice.
    start, stride = rng.integers(0, CLIPS, (IDENTITIES, 1)), 7_919
    return gallery, (start + stride * np.arange(K)) % CLIPS


def main() -> None:
    rng = np.random.default_rng(0)
    gallery, ranking = ranking_problem(rng)
    codes = np.arange(IDENTITIES)
    names = [f"IQIYI_VID_VAL_{row:07d}.mp4" for row in range(CLIPS)]
    identities = [str(code + 1) for code in codes]
    owners = np.split(np.argsort(gallery, kind="stable"), np.cumsum(np.bincount(gallery + 1))[:-1])[1:]
    truth = identities, [[names[row] for row in rows] for rows in owners]
    # A file's names are strings of their own, whose hashes are not known yet.
    result = identities, [[f"IQIYI_VID_VAL_{row:07d}.mp4" for row in rows] for rows in ranking.tolist()]
    score = metrics.score_ranking(ranking, gallery, codes)
    if not np.array_equal(score.ap, metrics.official_score(truth, result).ap):
        raise RuntimeError("the two ways of scoring disagree")

    feature = torch.randn(CLIPS // 10, DIM, generator=torch.Generator().manual_seed(0))
    prototype = torch.randn(IDENTITIES, DIM, generator=torch.Generator().manual_seed(1))

    def cosines_alone():
        for _ in rank.cosine_scores(feature, prototype):
            pass

    table = [
        ("official_score, lists of names", seconds(lambda: metrics.official_score(truth, result))),
        ("score_ranking, arrays", seconds(lambda: metrics.score_ranking(ranking, gallery, codes))),
        ("bootstrap_interval, 2000 draws", seconds(lambda: metrics.bootstrap_interval(score.ap))),
        ("paired_test, 2000 draws", seconds(lambda: metrics.paired_test(score.ap, score.ap[::-1]))),
        ("cosine_scores, a tenth of the clips", seconds(cosines_alone)),
        (
            "top_k of them, a tenth of the clips",
            seconds(lambda: rank.top_k(rank.cosine_scores(feature, prototype))),
        ),
        (
            "top_k of log softmax, a tenth",
            seconds(lambda: rank.top_k(rank.cosine_scores(feature, prototype, scale=30.0))),
        ),
    ]
    print(f"{IDENTITIES} identities, {CLIPS} clips, {K} a query")
    print(f"{torch.get_num_threads()} threads, best of {REPEATS}")
    print(pd.DataFrame(table, columns=["what", "seconds"]).to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    main()
