"""Hold every part against the released code of 2019: one set of weights in its networks and in ours, in float64.

A part's figure is the largest difference of any number, over the larger of 1 and the largest number that it is of.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.data import FACE, SCENE, write_store
from benchmarks.reference import released
from mmlib import metrics, rank
from mmlib.aggregate import AGGREGATORS, NAN
from mmlib.data.iqiyi import export_folder, import_folder, pickle_path
from mmlib.data.store import ClipStore
from mmlib.data.submission import read_result, read_val_truth, write_result, write_val_truth
from mmlib.models import Dropout, IdentityModel, gap
from mmlib.retrieve import make_model
from mmlib.systems import ONE_NAME_AS_CODED as SYSTEM
from mmlib.train import _optimiser

CLIPS, CLASSES, STEPS = 12, 7, 2
BOUND = 1e-9  # of every difference
_NAMES = {  # of the released state dict, in the order in which they are replaced
    r"^mma_layer\.W_(g|z\.0|theta\.0|phi\.0)\.": r"aggregator.\1.",
    r"^mma_layer\.W_(z|theta|phi)\.1\.": r"aggregator.\1_norm.",
    r"^(aggregator\.\w+)\.0\.": r"\1.",
    r"z_norm": "norm",
    r"^nan_layer\.q$": "aggregator.query",
    r"^scene_fc\.": "branches.scene.layers.",
    r"^(final_)?fc\.": "mlp.layers.",
    r"^weight$": "prototype",
}


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the weights of a released network, by its state dict, as an ``IdentityModel`` of its system names them.

    A bias before a batch norm, which that takes out, moves into its running mean.  A map that is dead, theta and phi
    and the shifts behind them being 0, is left out.
    """
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, to in _NAMES.items():
            name = re.sub(pattern, to, name)
        out[name] = value.flatten() if name.endswith("query") else value[..., 0] if value.dim() == 3 else value
    for name in [name for name in out if re.search(r"layers\.[04]\.bias$", name)]:
        norm = re.sub(r"(\d)\.bias$", lambda found: f"{int(found[1]) + 1}.running_mean", name)
        out[norm] = out[norm] - out.pop(name)
    affinity = {name: value for name, value in out.items() if re.search(r"\.(theta|phi)(_norm)?\.", name)}
    alive = any((value != 0).any() for name, value in affinity.items() if re.search(r"(theta|phi)\.weight|bias$", name))
    return {name: value for name, value in out.items() if alive or name not in affinity}


@torch.no_grad()
def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two tensors, over the larger of 1 and the largest number expected."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1)) if expected.numel() else 0.0


def compare_networks(theirs: nn.Module, ours: IdentityModel, arguments: tuple, inputs: dict, loss, label) -> dict:
    """Train both for some steps by SGD as released, on the same clips and dropout masks: differences by what of.

    theirs takes ``arguments``, ours ``inputs``; loss: of their cosines and labels.  Ours starts with their weights.
    """
    draw = torch.Generator().manual_seed(5)
    missing = ours.load_state_dict(converted(theirs.state_dict()), strict=False)
    assert not missing.unexpected_keys and {name.split(".")[-1] for name in missing.missing_keys} <= {
        "absent",
        "centre",
    }, missing
    drops = [(part, name, layer) for part in theirs.modules() for name, layer in part.named_children()]
    drops = [(part, name) for part, name, layer in drops if isinstance(layer, nn.Dropout)]
    for (part, name), layer in zip(drops, (m for m in ours.modules() if isinstance(m, Dropout)), strict=True):
        layer.keep = layer.draw(len(label), draw).double()
        setattr(part, name, layer)  # with its mask
    found = {"outputs, eval": difference(ours.eval()(**inputs), theirs.eval()(*arguments))}
    training = SYSTEM.training
    mine = _optimiser(dict(ours.named_parameters()), training)
    other = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-5)
    for part in ("outputs, training", "loss", "gradients", "weights after steps"):
        found[part] = 0.0
    for _ in range(STEPS):
        cosines = ours.train()(**inputs), theirs.train()(*arguments)
        losses = SYSTEM.loss(cosines[0], label), loss(cosines[1], label)
        for optimiser, value in zip((mine, other), losses):
            optimiser.zero_grad()
            value.backward()
        named = converted({name: _zero_if_none(value) for name, value in theirs.named_parameters()} | _means(theirs))
        slopes = [difference(_zero_if_none(p), named[name]) for name, p in ours.named_parameters() if name in named]
        for part, value in (
            ("outputs, training", difference(*cosines)),
            ("loss", difference(*losses)),
            ("gradients", np.max(slopes)),
        ):
            found[part] = float(np.maximum(found[part], value))  # which keeps NaN, as max does not
        mine.step()
        other.step()
    state, named = ours.state_dict(), converted(theirs.state_dict())
    found["weights after steps"] = _largest((state[name], value) for name, value in named.items())
    return found | {"outputs, eval, after steps": difference(ours.eval()(**inputs), theirs.eval()(*arguments))}


def _largest(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the largest difference of pairs, NaN where one is."""
    return float(np.max([difference(*pair) for pair in pairs]))


def _zero_if_none(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _means(model: nn.Module) -> dict[str, Tensor]:
    """Stand in for the running means, which ``converted`` adds biases to, where it renames gradients."""
    return {name: torch.zeros_like(value) for name, value in model.named_buffers() if name.endswith("running_mean")}


def randomised(model: nn.Module, *, dead: bool) -> nn.Module:
    """Give a released network other weights than its start, as training would.

    It gives none to the biases before a batch norm, and of a dead map none to theta and phi: their gradients are 0.
    """
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.double().named_parameters():
            idle = re.search(r"fc\.[04]\.bias", name) or (dead and re.search(r"W_(theta|phi)\.(0\.w|1\.b)", name))
            if not idle:
                value += 0.05 * torch.randn(value.shape, generator=draw, dtype=value.dtype)
    return model


def batch(dim: int = 480, scene: int = 1920) -> tuple[tuple[Tensor, Tensor], dict, Tensor]:
    """Return clips of forty frames as the released network takes them, as ours does, and their labels."""
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(CLIPS, 40, dim, generator=draw, dtype=torch.float64)
    quality, det = (torch.rand(CLIPS, 40, generator=draw, dtype=torch.float64) * top for top in (200, 1))
    context = torch.rand(CLIPS, scene, generator=draw, dtype=torch.float64)
    frames = torch.cat([x, quality[..., None] / 100, det[..., None]], dim=2)
    known = torch.ones(CLIPS, dtype=torch.bool)
    mask = torch.ones(CLIPS, 40, dtype=torch.bool)
    inputs = {"x": x, "mask": mask, "quality": quality, "det": det, "contexts": {"scene": (context, known)}}
    return (frames, context), inputs, torch.arange(CLIPS) % CLASSES


def network(*, alone: bool = False, alive: bool = False) -> IdentityModel:
    """Return ours: the first member of the system as coded, or of its fallback, at the challenge's widths."""
    widths = {"face": FACE, "scene": SCENE}
    modalities = {name: SimpleNamespace(feature=np.zeros((0, dim))) for name, dim in widths.items()}
    store = SimpleNamespace(modalities=modalities, identities=np.arange(CLASSES))
    system = replace(SYSTEM, aggregator="as coded, alive") if alive else SYSTEM
    return make_model(system.second() if alone else system, store, 0).double()  # type: ignore[arg-type]


def check(reference: str, **_) -> dict:
    """Compare every part, in the working folder; rows: its name, what of it, the difference."""
    torch.manual_seed(0)
    rows = []
    for name, part in PARTS.items():
        rows += [{"part": name, "of": of, "difference": value} for of, value in part(reference).items()]
    return {"rows": rows}


def _loss(reference: str):
    models = released(reference, "models")
    margin, focal = models.ArcMarginProduct(), models.FocalLoss(gamma=2.0)

    def loss(cosine: Tensor, label: Tensor) -> Tensor:
        # Its one-hot matrix is made in float32, which is exact.
        return focal(margin(cosine, label), label)

    return loss


def _networks(reference: str, **kind) -> dict:
    models, (arguments, inputs, label) = released(reference, "models"), batch()
    theirs = models.ArcFaceSceneModel(482, 1920, CLASSES)
    return compare_networks(
        randomised(theirs, dead=not kind["alive"]), network(**kind), arguments, inputs, _loss(reference), label
    )


def alone(reference: str) -> dict:
    models, (arguments, inputs, label) = released(reference, "models"), batch(scene=1984)
    theirs = randomised(models.ArcSceneFeatModel(1984, CLASSES), dead=True)
    inputs = {"contexts": inputs["contexts"]}
    return compare_networks(theirs, network(alone=True), arguments[1:], inputs, _loss(reference), label)


def attention(reference: str) -> dict:
    """Channel attention and one block of NAN, alive, by themselves."""
    models = released(reference, "models")
    theirs = randomised(models.ArcFaceSceneModel(482, 1920, CLASSES), dead=False)
    ours, (arguments, inputs, _) = AGGREGATORS["as coded, alive"](480).double(), batch()
    state = {name: value for name, value in theirs.state_dict().items() if name.startswith(("mma_layer", "nan_layer"))}
    ours.load_state_dict({name.removeprefix("aggregator."): v for name, v in converted(state).items()})
    found = {}
    for mode in (False, True):
        theirs.train(mode), ours.train(mode)
        expected = theirs.nan_layer(theirs.mma_layer(arguments[0]))
        pooled = ours(*(inputs[name] for name in ("x", "mask", "quality", "det")))
        found["outputs, training" if mode else "outputs, eval"] = difference(pooled, expected)
    for value in (pooled, expected):
        value.square().sum().backward()
    named = converted({name: _zero_if_none(value) for name, value in theirs.named_parameters()} | _means(theirs))
    slopes = ((_zero_if_none(value), named[f"aggregator.{name}"]) for name, value in ours.named_parameters())
    return found | {"gradients": _largest(slopes)}


def nan_block(reference: str) -> dict:
    theirs = randomised(released(reference, "models").layer.NanAttentionLayer(482, 1), dead=False)
    ours, (arguments, inputs, _) = NAN(480, scores=True).double(), batch()
    ours.load_state_dict({"query": theirs.q.detach().flatten()})
    found, expected = ours(*(inputs[name] for name in ("x", "mask", "quality", "det"))), theirs(arguments[0])
    for value in (found, expected):
        value.square().sum().backward()
    return {"outputs": difference(found, expected), "gradients": difference(ours.query.grad, theirs.q.grad.flatten())}


def towers(reference: str, name: str) -> dict:
    """The scene branch or the residual MLP by themselves, without dropout."""
    theirs = randomised(released(reference, "models").ArcFaceSceneModel(482, 1920, CLASSES), dead=True)
    ours, (arguments, inputs, _) = network(), batch()
    ours.load_state_dict(converted(theirs.state_dict()), strict=False)
    for part in (*theirs.modules(), *ours.modules()):
        if isinstance(part, nn.Dropout | Dropout):
            part.p = 0.0
    x = torch.randn(CLIPS, 602, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = {}
    for mode in (False, True):
        theirs.train(mode), ours.train(mode)
        if name == "scene branch":
            values = ours.branches["scene"](*inputs["contexts"]["scene"]), theirs.scene_fc(arguments[1])
        else:
            values = ours.mlp(x), x + theirs.final_fc(x)
        found["outputs, training" if mode else "outputs, eval"] = difference(*values)
    for value in values:
        value.square().sum().backward()
    named = converted({key: _zero_if_none(value) for key, value in theirs.named_parameters()} | _means(theirs))
    slopes = [(value.grad, named.get(key)) for key, value in ours.named_parameters() if value.grad is not None]
    return found | {"gradients": _largest(pair for pair in slopes if pair[1] is not None)}


def loss(reference: str) -> dict:
    draw = torch.Generator().manual_seed(6)
    cosines = [2 * torch.rand(64, 101, generator=draw, dtype=torch.float64) - 1]
    cosines = [cosines[0].requires_grad_(), cosines[0].detach().clone().requires_grad_()]
    label = torch.randint(101, (64,), generator=draw)
    values = SYSTEM.loss(cosines[0], label), _loss(reference)(cosines[1], label)
    slopes = [torch.autograd.grad(value, cosine)[0] for value, cosine in zip(values, cosines)]
    return {"outputs": difference(*values), "gradients": difference(*slopes)}


def views(reference: str) -> dict:
    """Count the masks that differ, of sixteen of faces and of scenes, and of thirty-two of scenes alone."""
    mask, wrong = released(reference, "utils").get_mask_index, 0
    for width, blocks in ((FACE, 16), (SCENE, 16), (SCENE, 32)):
        for block in range(blocks):
            kept = np.delete(np.arange(width), np.r_[gap(width, (block, blocks))])
            wrong += kept.tolist() != mask(block, width, blocks)
    return {"masks that differ": float(wrong)}


def _faces() -> tuple[ClipStore, Path]:
    """Return official files of clips, some without a face, of norms near the fallback's threshold, as a store too."""
    rng, official = np.random.default_rng(7), Path("official")
    split = np.repeat(["train", "val", "test"], [20, 20, 400])
    identity = np.where(split == "test", -1, rng.integers(0, 5, len(split)))
    if not official.exists():
        write_store(Path("drawn"), rng.integers(0, 9, len(split)), split, identity, 5, norm=8.863)
        export_folder(ClipStore.open("drawn"), official)
        import_folder(official, Path("imported"), progress=False)
    return ClipStore.open("imported"), official


def fallback(reference: str) -> dict:
    """Mix the scores of two ensembles of three by its last script, and by ours."""
    store, folder = _faces()
    script, draw = released(reference, "main"), torch.Generator().manual_seed(8)
    test = store.select("test")
    names, having = store.clips["clip"].to_numpy(object)[test], store.modalities["face"].count[test] > 0
    cosines = {}
    for kind, rows in (("face_scene", having), ("scene", np.full(len(test), True))):
        cosines[kind] = [torch.rand(rows.sum(), 11, generator=draw, dtype=torch.float64) for _ in range(3)]
        root = Path(f"multi_view_{kind}_result")
        root.mkdir()
        for place, cosine in enumerate(cosines[kind]):
            saved = 1, names[rows].tolist(), torch.softmax(cosine, 1).numpy()
            Path(root, f"{place}.pickle").write_bytes(pickle.dumps(saved))
    split = script.split_name_by_l2norm
    script.split_name_by_l2norm = lambda path, points: split(str(pickle_path(folder, "face", "test")), points)
    scores, said = script.main()
    asked = SYSTEM.fallback
    both, alone = (rank.combine_scores(cosines[kind], "softmax", scale=1.0) for kind in ("face_scene", "scene"))
    low = torch.from_numpy(asked.weights(store.clip_means("face", asked.by)[test][having]))[:, None]
    found = asked.absent * alone
    found[having] = (1 - low) * both + low * alone[having]
    order = {name: row for row, name in enumerate(said)}
    expected = scores[[order[name] for name in names]]
    changed = float((low > 0).sum())
    return {f"scores, {changed:.0f} of {having.sum()} clips of low norm": difference(found, expected)}


def faces(reference: str) -> dict:
    """Read the same pickle: clips, frames, boxes, scores and features."""
    store, folder = _faces()
    theirs = released(reference, "utils").load_face_from_pickle(str(pickle_path(folder, "face", "test")))
    face, worst = store.modalities["face"], 0.0
    rows = {name: clip for clip, name in enumerate(store.clips["clip"])}
    columns = {"frame": "frame_id", "box": "bbox", "det": "det_score", "quality": "quality_score"}
    for clip in theirs:
        at = rows[clip["video_name"]]
        span = slice(face.start[at], face.start[at] + face.count[at])
        known = {name: np.array([frame[key] for frame in clip["frame_infos"]]) for name, key in columns.items()}
        known["feature"] = np.array([frame["feat"] for frame in clip["frame_infos"]])
        assert len(known["frame"]) == face.count[at], clip["video_name"]
        for name, value in known.items():
            ours = face.feature[span] if name == "feature" else face.columns[name][span]
            # A clip may be listed without a face.
            worst = float(np.maximum(worst, np.abs(ours - value.astype(ours.dtype).reshape(ours.shape)).max(initial=0)))
    return {f"{len(theirs)} clips": worst}


def evaluation(reference: str) -> dict:
    """Score random files, in which clips repeat, identities are missing and some have more clips than are ranked."""
    score, worst = released(reference, "evaluation_map").calculate_map, 0.0
    truth, result = Path("val_gt.txt"), Path("result.txt")
    for seed in range(200):
        rng = np.random.default_rng(seed)
        names = np.array([f"clip{number}" for number in range(400)], object)
        identities = [str(number) for number in range(1, 1 + rng.integers(1, 9))]
        wanted = [rng.choice(names, rng.integers(1, 150), replace=False) for _ in identities]
        write_val_truth(truth, identities, wanted)
        answered = rng.permutation(identities)[: rng.integers(1, 1 + len(identities))]
        ranking = np.array([rng.choice(len(names), 100, replace=bool(rng.integers(2))) for _ in answered])
        ranking[rng.random(len(ranking)) < 0.2, rng.integers(1, 100) :] = -1
        write_result(result, list(answered), ranking, names)
        found = metrics.official_score(read_val_truth(truth), read_result(result)).map_at_k
        worst = float(np.maximum(worst, abs(found - score(str(truth), str(result)))))
    return {"MAP@100 of 200 files": worst}


PARTS = {
    "channel attention": attention,
    "NAN": nan_block,
    "scene branch": lambda path: towers(path, "scene branch"),
    "MLP": lambda path: towers(path, "MLP"),
    "network, face and scene": lambda path: _networks(path, alive=False),
    "network, brought to life": lambda path: _networks(path, alive=True),
    "network, scene alone": alone,
    "loss": loss,
    "views": views,
    "fallback": fallback,
    "evaluation": evaluation,
    "import": faces,
}
