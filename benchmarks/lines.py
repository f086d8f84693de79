"""The lines of the table: which step measures each, what it needs, what it is held against, and the bars."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.growth import SERIES
from mmlib.aggregate import AGGREGATORS


@dataclass(frozen=True)
class Bar:
    """A bound on a line: ``quantity`` (seconds or memory) of ``other`` divided by the line's is at least ``ratio``.

    other: ``baseline`` or ``reference``; empty for a bound on the line itself, at most ``most``.
    """

    quantity: str
    other: str = ""
    ratio: float = 0.0
    most: float = 0.0


@dataclass(frozen=True)
class Line:
    """A line: ``step`` is ``module:function`` of this package, ``needs`` are the steps that write its data.

    baseline: the step of another way to the same result.  reference: that of the released code.  gpu: whether it runs
    on a GPU too.  arguments: of the step.
    """

    name: str
    step: str
    needs: tuple[str, ...] = ()
    baseline: str = ""
    reference: str = ""
    bars: tuple[Bar, ...] = ()
    gpu: bool = False
    arguments: dict = field(default_factory=dict)


FACES, CLIPS, STORE, RANKING, CHALLENGE, VIDEO = (
    "data:make_faces",
    "data:make_clips",
    "data:make_store",
    "ranking:make_ranking",
    "data:make_challenge",
    "faces:make_video",
)
GROWN = {"import": ("growth:make_imports",), "open": ("growth:make_opens",), "epoch": ("growth:make_epochs",)}
GROWN["drawn epoch"] = GROWN["epoch"]

LINES = [
    Line(
        "import",
        "clips:import_official",
        (FACES,),
        "clips:load_pickle",
        "reference:load_faces",
        (Bar("memory", "reference", 3), Bar("seconds", "baseline", 1 / 1.5)),
    ),
    Line("open", "clips:open_store", (STORE,)),
    Line(
        "first batch",
        "clips:first_batch",
        (CLIPS,),
        reference="reference:first_batch",
        bars=(Bar("seconds", "reference", 50),),
    ),
    *(
        Line(f"batch, {sample}", "clips:batch", (STORE,), arguments={"sample": sample})
        for sample in ("first", "random", "replace", "draw")
    ),
    *(
        Line(
            f"epoch, {name}",
            "training:epoch",
            (CLIPS,),
            gpu=True,
            arguments={"aggregator": name},
            **(
                {"reference": "reference:epoch", "bars": (Bar("seconds", "reference", 10),)}
                if name == "as coded"
                else {}
            ),
        )
        for name in AGGREGATORS
    ),
    Line(
        "loss",
        "training:loss",
        baseline="training:loss_elsewhere",
        bars=(Bar("seconds", "baseline", 1.5), Bar("memory", "baseline", 1 / 0.6)),
    ),
    Line("members together", "training:members_together", (CLIPS,), "training:members_apart", gpu=True),
    Line("challenge, one member", "training:challenge", (CHALLENGE,), gpu=True),
    Line(
        "rank",
        "ranking:stream",
        (),
        "ranking:dense",
        gpu=True,
        bars=(Bar("memory", most=500e6), Bar("seconds", "baseline", 1)),
    ),
    Line(
        "rank, 8 members",
        "ranking:stream",
        (),
        "ranking:dense",
        gpu=True,
        bars=(Bar("memory", most=500e6), Bar("seconds", "baseline", 3)),
        arguments={"members": 8},
    ),
    Line("rank, cosines", "ranking:cosines", baseline="ranking:searched"),
    Line("tenfold, epoch", "growth:tenfold_epoch", ("growth:make_tenfold",), gpu=True),
    Line("tenfold, rank", "growth:tenfold_rank", gpu=True),
    Line("busy, rank", "ranking:busy", baseline="ranking:busy_one_thread", bars=(Bar("seconds", "baseline", 1 / 1.5),)),
    Line("merge", "ranking:merge", gpu=True),
    Line(
        "metric",
        "ranking:metric",
        (RANKING,),
        "ranking:metric_trec",
        "reference:metric",
        (Bar("seconds", "baseline", 1.5), Bar("seconds", "reference", 1.5)),
    ),
    Line("metric, arrays", "ranking:metric_arrays"),
    Line("metric, bootstrap", "ranking:bootstrap"),
    Line(
        "forward, scene network",
        "networks:forward",
        gpu=True,
        arguments={"architecture": "seresnext50_32x4d", "size": 224},
    ),
    Line(
        "faces, embed",
        "faces:embed",
        (VIDEO,),
        "faces:embed_singly",
        bars=(Bar("seconds", most=30), Bar("seconds", "baseline", 1.6)),
    ),
    Line(
        "faces, embed, MobileFaceNet",
        "faces:embed",
        (VIDEO,),
        "faces:embed_singly",
        bars=(Bar("seconds", most=60), Bar("seconds", "baseline", 1.6)),
        arguments={"architecture": "mobilefacenet"},
    ),
    Line(
        "faces, video",
        "faces:import_video",
        (VIDEO,),
        "faces:import_video_singly",
        bars=(Bar("seconds", most=60), Bar("seconds", "baseline", 4)),
    ),
    Line("world", "commands:world", bars=(Bar("seconds", most=60),)),
    Line("predict", "commands:predict", ("commands:make_world",)),
    Line(
        "predict, as coded",
        "commands:predict",
        ("commands:make_world",),
        "commands:predict_described",
        bars=(Bar("seconds", "baseline", 0.5),),
        arguments={"system": "one-name-as-coded"},
    ),
    Line("book", "commands:build"),
]
GROWTH = [
    Line(
        f"growth, {series}",
        "growth:grow",
        GROWN.get(series.split(", ")[0], ()),
        gpu=series.split(", ")[0] in ("epoch", "drawn epoch", "rank"),
        arguments={"series": series},
    )
    for series in SERIES
]


def chosen(names: list[str]) -> tuple[list[Line], list[Line], bool, bool]:
    """Return the lines, the growth series, whether the scene lines and the parity are wanted; no names are all of them.

    A name stands for every line that begins with it: ``epoch``, ``growth, rank``.  Lines come in the names' order.
    """
    known = [line.name for line in LINES + GROWTH] + ["scene", "parity"]
    for name in names:
        if not any(line.startswith(name) for line in known):
            raise ValueError(f"--only {name}: no line begins so; there are {', '.join(known)}")

    def wanted(lines: list[Line]) -> list[Line]:
        of_name = [line for name in names or [""] for line in lines if line.name.startswith(name)]
        return list({line.name: line for line in of_name}.values())

    scene, parity = (not names or any(word.startswith(name) for name in names) for word in ("scene", "parity"))
    return wanted(LINES), wanted(GROWTH), scene, parity
