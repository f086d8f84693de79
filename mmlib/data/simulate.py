"""Draw a world: a calibrated stand-in for the licence-gated iQIYI-VID-2019 clips.

A *world* is one draw: persons, shows, clips and frames.  Everything is drawn from a latent quality and a latent
embedding that no model sees; what a model sees is a nonlinear image of the embedding, a norm and two scores that
follow the quality imperfectly.  Marginals are held against published numbers by :mod:`mmlib.data.calibration`;
no constant here was chosen by a comparison of methods (CHANGELOG, "freeze").
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm as normal
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from mmlib.data.calibration import FRAME_SURVIVAL, NORM_KNOTS, QUALITY_KNOTS, clips_per_identity
from mmlib.data.store import ClipStore

DIM, SCENE_DIM, NUISANCE_DIM, WARP_DIM = 512, 2048, 64, 256
KINDS = 4  # nuisance bases, mixed by person
GATE = 3.0  # how far a person's mixture is from an even one
CHUNK = 512  # clips drawn from one generator; part of the definition of a world
SEGMENT = 8  # frames that share pose and light
PROFILES = {"tiny": 60, "quick": 500, "full": 10_034}  # identities

# Noise amplitude by percentile of the latent quality, relative to the median clip; calibrated on the accuracy of one
# trained system by clip quality.
_PERCENTILE = [0.0003, 0.005, 0.015, 0.025, 0.035, 0.05, 0.07, 0.1, 0.14, 0.18, 0.25, 0.5, 0.75, 0.9, 0.9999]
_AMPLITUDE = [900, 350, 80, 27, 14, 8, 5.5, 3.6, 2.7, 2.1, 1.6, 1.0, 0.8, 0.7, 0.55]
NOISE_KNOTS = [*zip(_PERCENTILE, _AMPLITUDE, strict=True)]
# Modality: weight of the show, exponent of quality, log-sd of clip difficulty, columns beside the feature.
OTHER = {
    "head": (0.3, 0.4, 0.7, ("frame", "box", "det")),
    "body": (0.7, 0, 0.5, ("frame", "box")),
    "audio": (0.2, 0, 0.5, ()),
}


@dataclass(frozen=True)
class Settings:
    """Constants of a world; the defaults are the calibrated point, frozen before any comparison was run.

    contaminated, mostly_wrong: shares of clips; wrong_quality: mean latent quality of the other person's faces; and
    reliability: correlation of latent quality and scores.  No published fact pins these four down: chapter 04 varies
    them.  The rest are standard deviations relative to an identity of length 1, unless said otherwise.
    """

    identities: int = PROFILES["quick"]
    contaminated: float = 0.15
    mostly_wrong: float = 0.025
    wrong_quality: float = -1.0
    reliability: float = 0.95
    lookalikes: float = 0.25  # share of persons in a lookalike group
    lookalike_weight: float = 0.45  # share of variance that a group has in common
    identities_per_show: float = 3.0
    no_face: float = 0.044
    role: float = 0.30  # make-up and age, shared by all clips of a person in one show
    clip_nuisance: float = 0.50
    clip_noise: float = 0.15
    clip_spread: float = 1.5  # log-sd of clip difficulty
    frame_nuisance: float = 0.7
    frame_noise: float = 0.6
    warp: float = 0.8  # weight of the nonlinear part of the embedding
    head_noise: float = 2.15
    audio_noise: float = 4.0
    body_noise: float = 6.0
    scene_noise: float = 1.5

    def __post_init__(self):
        most = {"lookalike_weight": 0.7}  # a group's weight varies by 1.4 and cannot pass 1
        most |= dict.fromkeys(("contaminated", "mostly_wrong", "reliability", "lookalikes", "no_face"), 1.0)
        least = {"identities": 2, "wrong_quality": -np.inf, "identities_per_show": 1e-9}
        for name, value in asdict(self).items():
            low, high, whole = least.get(name, 0), most.get(name, np.inf), name == "identities"
            if not (np.isfinite(value) and low <= value <= high) or (whole and not isinstance(value, int)):
                raise ValueError(f"{name} must be a {'whole ' * whole}number in [{low:g}, {high:g}], got {value}")


def settings_for(profile: str, **overrides) -> Settings:
    """Return the settings of a profile (``tiny``, ``quick`` or ``full``) with some of them overridden."""
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    known = [field.name for field in fields(Settings)]
    if unknown := set(overrides) - set(known):
        listed = ", ".join(sorted(unknown))
        raise ValueError(f"the simulator has no setting named {listed}; there are {', '.join(known)}")
    return Settings(**{"identities": PROFILES[profile]} | overrides)


def simulate(
    path: str | Path, settings: Settings, seed: int, *, overwrite: bool = False, progress: bool = False
) -> ClipStore:
    """Draw world ``seed`` and write it as a :class:`ClipStore`.

    The same settings and seed give the same bytes, whatever the threads; on another kind of processor the last bit of a
    matrix product, and so of a feature, may differ.
    """
    world = World(settings, seed)
    provenance = {"source": "simulator", "seed": seed, "settings": asdict(settings)}
    with ClipStore.create(path, simulated=True, provenance=provenance, overwrite=overwrite) as writer:
        total = -(-len(world.clips) // CHUNK)
        shown = {"desc": "simulate", "unit": "chunk", "disable": not progress, "mininterval": 1}
        for drawn in tqdm(_drawn(world), total=total, **shown):
            for modality, columns in drawn.items():
                writer.append(modality, **columns)
        writer.finish(world.clips, [str(i + 1) for i in range(settings.identities)], world.spans)
    return ClipStore.open(path)


def _drawn(world: World) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """Yield the chunks of a world in their order, drawn by a thread a core, some ahead of what is taken.

    Threads, because the generators and the matrix products release the interpreter lock; a product is then left to one
    of them, as BLAS threads of several products wait for each other.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        ahead: deque = deque()
        for first in range(0, len(world.clips), CHUNK):
            ahead.append(pool.submit(world.chunk, first))
            if len(ahead) > 2 * threads:  # a world is larger than the memory
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class World:
    """Persons, shows and clips of one world; :meth:`chunk` draws their frames.

    ``clips``, the final table, has the simulator's truth too, ``show``, ``set`` and ``latent_quality``; a face has
    ``wrong``, True where it is another person's.
    """

    def __init__(self, settings: Settings, seed: int):
        self.settings, self.seed = settings, seed
        rng = np.random.default_rng([seed, 0])
        self.clips, self.person = draw_clips(settings.identities, rng)
        self.listed, self.persons = settings.identities, int(self.person.max()) + 1
        self._draw_persons(rng)
        self._draw_tracks(rng)
        self._draw_other(rng)
        segments = np.maximum(1, -(-self.frames // SEGMENT))
        one = np.ones(len(self.clips), np.int64)
        counts = {"face": self.frames, "head": segments, "body": segments, "audio": one, "scene": one}
        self.spans = {name: (np.cumsum(count) - count, count) for name, count in counts.items()}  # start, count

    def _draw_persons(self, rng: np.random.Generator) -> None:
        """Draw identity vectors `mu` (P, D) and the nuisance basis (64, D), in the eigenbasis of identities."""
        s = self.settings
        spectrum = (1 + np.arange(DIM) / 60) ** -1.5
        self.sd = np.sqrt(spectrum / spectrum.sum()).astype(np.float32)
        groups = max(1, round(self.persons * s.lookalikes / 3))
        member = rng.random(self.persons) < s.lookalikes
        group = rng.integers(groups, size=self.persons)
        weight = np.where(member, s.lookalike_weight * rng.uniform(0.6, 1.4, self.persons), 0)[:, None]
        cluster = rng.choice(20, self.persons, p=rng.dirichlet(np.full(20, 3.0)))
        gender = rng.choice([-1.0, 1.0], self.persons)[:, None]
        own, look, shared = (unit_draws(n, self.sd, rng) for n in (self.persons, groups, 21))
        mu = np.sqrt(0.03) * gender * shared[20] + np.sqrt(0.04) * shared[cluster]
        mu = mu + np.sqrt(weight) * look[group] + np.sqrt((1 - weight) * 0.93) * own
        self.mu = unit(mu - mu[: self.listed].mean(0)).astype(np.float32)
        variance = 1 / (1 + np.arange(NUISANCE_DIM) / 8)
        basis = np.zeros((KINDS, NUISANCE_DIM, DIM), np.float32)
        for kind in basis:  # half of the nuisance lives where identities live, half where they do not
            within = rng.choice(120, NUISANCE_DIM // 2, replace=False)
            beyond = 200 + rng.choice(DIM - 200, NUISANCE_DIM // 2, replace=False)
            turned, _ = np.linalg.qr(rng.standard_normal((NUISANCE_DIM, NUISANCE_DIM)))
            kind[:, np.concatenate([within, beyond])] = turned
        basis *= np.sqrt(variance / variance.sum())[:, None].astype(np.float32)
        self.basis = basis.reshape(KINDS * NUISANCE_DIM, DIM)
        # How a face changes with pose and light depends on whose it is: each person mixes the kinds in their own way.
        gate = np.exp(GATE * unit(self.mu @ rng.standard_normal((DIM, KINDS))))
        self.gate = unit(gate).astype(np.float32)
        rotation, _ = np.linalg.qr(rng.standard_normal((DIM, DIM)))
        # The observed embedding is a fixed residual network of the latent one; [rotation, inner] is one product.
        inner = rng.standard_normal((DIM, WARP_DIM))
        self.inner = np.hstack([rotation, inner]).astype(np.float32)
        self.outer = (s.warp * rng.standard_normal((WARP_DIM, DIM)) / np.sqrt(WARP_DIM * DIM / 3)).astype(np.float32)
        self.unrecognisable = unit_draws(1, self.sd, rng)[0]

    def _draw_tracks(self, rng: np.random.Generator) -> None:
        """Give every clip a show, a latent quality, a number of frames and, if contaminated, another person."""
        s, n = self.settings, len(self.clips)
        shows = max(2, round(self.listed / s.identities_per_show))
        popularity = (np.arange(shows) + 20.0) ** -0.7
        self.person_shows = rng.choice(shows, (self.persons, 4), p=popularity / popularity.sum())
        many = np.minimum(1 + rng.poisson(1, self.persons), 4)
        weight = rng.gamma(1, size=(self.persons, 4)) * (np.arange(4) < many[:, None])
        slot = pick(weight[self.person], rng)
        show = self.person_shows[self.person, slot]
        # One role per (person, slot): make-up and age are the same in all clips of a person in a show.
        self.role = rng.standard_normal((self.persons, 4, NUISANCE_DIM), dtype=np.float32)
        sets = rng.integers(4, size=(self.persons, 4))[self.person, slot]
        stage = np.where(rng.random(n) < 0.5, sets, rng.integers(4, size=n))
        self.latent = rng.standard_normal(n)
        frames = draw_frames(rng.random(n))
        frames[rng.random(n) < s.no_face] = 0
        share = np.where(rng.random(n) < s.contaminated, rng.beta(1, 2.5, n), 0)
        share = np.where(rng.random(n) < s.mostly_wrong, rng.uniform(0.8, 1, n), share)
        self.wrong_share = np.where(frames > 0, share, 0)
        # The other person comes from a random clip of the same show; from anywhere if that is the same person.
        order = np.argsort(show, kind="stable")
        first = np.searchsorted(show[order], np.arange(shows))
        size = np.bincount(show, minlength=shows)
        other = self.person[order[first[show] + (rng.random(n) * size[show]).astype(int)]]
        anyone = (self.person + 1 + rng.integers(self.persons - 1, size=n)) % self.persons
        self.other = np.where(other == self.person, anyone, other)
        self.other_latent = s.wrong_quality + rng.standard_normal(n)
        self.frames, self.slot = frames, slot
        self.clips["show"] = show.astype(np.int32)
        self.clips["set"] = stage.astype(np.int32)
        self.clips["latent_quality"] = self.latent

    def _draw_other(self, rng: np.random.Generator) -> None:
        """Draw what head, audio, body and scene are made of: a vector a person and a vector a show."""
        spectrum, scene = np.sqrt((1 + np.arange(DIM) / 40) ** -1.5), (1 + np.arange(SCENE_DIM) / 60) ** -0.75
        self.other_sd, self.scene_sd = ((sd / np.sqrt((sd**2).sum())).astype(np.float32) for sd in (spectrum, scene))
        shows = int(self.person_shows.max()) + 1
        self.other_rotation = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0].astype(np.float32)
        self.other_mu = {name: [unit_draws(n, self.other_sd, rng) for n in (self.persons, shows)] for name in OTHER}
        scene = scene.astype(np.float32)
        self.scene_mu = [unit_draws(n, scene, rng) for n in (shows, shows * 4)]
        self.scene_shuffle = rng.permutation(SCENE_DIM)  # spreads the spectrum over the coordinates

    def chunk(self, first: int) -> dict[str, dict[str, np.ndarray]]:
        """Draw all modalities of the clips ``first .. first + CHUNK``; independent of every other chunk."""
        rng = np.random.default_rng([self.seed, 1, first])
        clips = np.arange(first, min(first + CHUNK, len(self.clips)))
        drawn = {"face": self._faces(clips, rng)}
        drawn |= {name: self._other(name, clips, rng) for name in OTHER}
        return drawn | {"scene": self._scenes(clips, rng)}

    def _faces(self, clips: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        s, count = self.settings, self.frames[clips]
        clip = np.repeat(np.arange(len(clips)), count)  # (F,) position of the frame's clip in the chunk
        order = np.arange(len(clip)) - np.repeat(np.cumsum(count) - count, count)
        segment = np.cumsum(order % SEGMENT == 0) - 1
        segments = segment[-1] + 1 if len(segment) else 0
        # Another person takes whole segments of a long clip, single frames of a short one.
        chance = rng.random(len(clip))
        together = chance[np.flatnonzero(order % SEGMENT == 0)][segment] if segments else chance
        wrong = np.where(count[clip] > 16, together, chance) < self.wrong_share[clips][clip]

        # Tracks: row t * len(clips) + clip, t = 0 the labelled person, t = 1 the other one.
        track = wrong * len(clips) + clip
        g = np.concatenate([self.latent[clips], self.other_latent[clips]])
        labelled = self._clip_vector(self.person[clips], self.slot[clips], self.latent[clips], rng)
        base = np.concatenate([labelled, self._clip_vector(self.other[clips], 0, self.other_latent[clips], rng)])
        shared, own = rng.standard_normal(segments), rng.standard_normal(len(clip))
        g_frame = np.sqrt(0.4) * g[track] + np.sqrt(0.4) * shared[segment] + np.sqrt(0.2) * own
        h = noise_amplitude(g_frame)[:, None]

        def within(dim):  # 60 % of the variance is shared within a segment
            common, single = (rng.standard_normal((n, dim), dtype=np.float32) for n in (segments, len(clip)))
            common *= np.float32(np.sqrt(0.6))
            single *= np.float32(np.sqrt(0.4))
            single += common[segment]
            return single

        latent = within(DIM)
        latent *= self.sd * np.float32(s.frame_noise)
        owner = np.concatenate([self.person[clips], self.other[clips]])[track]
        latent += self._displace(within(NUISANCE_DIM) * np.float32(s.frame_nuisance) / np.sqrt(h), owner)
        latent += 0.25 * np.maximum(1 - 1 / h, 0) * self.unrecognisable
        latent *= h
        latent += base[track]
        feature = self.observe(latent)

        r, e = s.reliability, np.sqrt(1 - s.reliability**2)
        deviation = g_frame - g[track]
        deviation /= np.sqrt((deviation**2).sum() / max(1, len(clip)) + 1e-12)
        level = quantile(NORM_KNOTS, 0.95 * g + 0.31 * rng.standard_normal(len(g)))[track]
        length = np.maximum(1.5, level + 1.4 * (0.8 * deviation + 0.6 * rng.standard_normal(len(clip))))
        feature *= length[:, None].astype(np.float32)
        bias = rng.standard_normal(len(g))[track]
        score = r * g_frame + e * np.sqrt(0.5) * (bias + rng.standard_normal(len(clip)))
        seen = r * g_frame + e * rng.standard_normal(len(clip))
        det = 1 - np.clip(0.012 * np.exp(-0.6 * seen + 0.6 * rng.standard_normal(len(clip))), 0, 0.5)
        return {
            "feature": feature.astype(np.float16),
            "quality": quantile(QUALITY_KNOTS, score),
            "det": det,
            "frame": (order * 2 + 1).astype(np.int32),
            "box": boxes(clip, g_frame, rng),
            "wrong": wrong,
        }

    def _clip_vector(self, person, slot, latent, rng: np.random.Generator) -> np.ndarray:
        """Draw what all frames of a track share: the person, the role, pose and light of the clip; (n, D)."""
        s, n = self.settings, len(person)
        h = noise_amplitude(latent)[:, None]
        difficulty = np.exp(s.clip_spread * rng.standard_normal((n, 1)) - s.clip_spread**2 / 2)
        nuisance = rng.standard_normal((n, NUISANCE_DIM)) * s.clip_nuisance * difficulty * np.sqrt(h)
        nuisance += s.role * self.role[person, slot]
        noise = rng.standard_normal((n, DIM)) * self.sd * s.clip_noise * difficulty * h
        return (self.mu[person] + self._displace(nuisance, person) + noise).astype(np.float32)

    def _displace(self, nuisance: np.ndarray, person: np.ndarray) -> np.ndarray:
        """Map nuisance (n, 64) of faces of ``person`` (n,) to latent embeddings (n, D)."""
        gated = self.gate[person][:, :, None] * nuisance[:, None, :]
        return gated.reshape(len(person), KINDS * NUISANCE_DIM).astype(np.float32) @ self.basis

    def observe(self, latent: np.ndarray) -> np.ndarray:
        """Map latent embeddings (F, D) to observed ones of length 1: a rotation plus a fixed tanh layer."""
        inner = latent @ self.inner
        out = inner[:, :DIM] + np.tanh(inner[:, DIM:]) @ self.outer
        return unit(out)

    def _other(self, name: str, clips: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        s_show, exponent, spread, columns = OTHER[name]
        noise = getattr(self.settings, f"{name}_noise")
        mu, shows = self.other_mu[name]
        count = self.spans[name][1][clips]
        clip = np.repeat(np.arange(len(clips)), count)
        h = np.minimum(noise_amplitude(self.latent[clips]), 20)[:, None] ** exponent
        amplitude = noise * np.exp(spread * rng.standard_normal((len(clips), 1))) * h
        base = mu[self.person[clips]] + s_show * shows[self.clips["show"].to_numpy()[clips]]
        base = base + amplitude * rng.standard_normal((len(clips), DIM), dtype=np.float32) * self.other_sd
        # Frames of one clip differ little: nearly all of the noise belongs to the clip.
        feature = base[clip] + 0.3 * amplitude[clip] * rng.standard_normal((len(clip), DIM)) * self.other_sd
        feature = 20 * unit(feature.astype(np.float32)) @ self.other_rotation
        out: dict[str, np.ndarray] = {"feature": feature.astype(np.float16)}
        if "det" in columns:
            out["det"] = 1 - np.clip(0.02 * rng.exponential(size=len(clip)), 0, 0.5)
        if "box" in columns:
            order = np.arange(len(clip)) - np.repeat(np.cumsum(count) - count, count)
            out |= {
                "frame": (order * SEGMENT * 2 + 1).astype(np.int32),
                "box": boxes(clip, self.latent[clips][clip], rng),
            }
        return out

    def _scenes(self, clips: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        show, stage = (self.clips[name].to_numpy()[clips] for name in ("show", "set"))
        feature = self.scene_mu[0][show] + 0.7 * self.scene_mu[1][show * 4 + stage]
        noise = rng.standard_normal((len(clips), SCENE_DIM), dtype=np.float32)
        feature += self.settings.scene_noise * noise * self.scene_sd
        feature = 20 * unit(feature)[:, self.scene_shuffle]
        return {"feature": feature.astype(np.float16), "frame": np.zeros(len(clips), np.int32)}


def draw_clips(identities: int, rng: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray]:
    """Draw the clips of ``identities``, the first persons, and of strangers: clip, split, identity; and persons (N,).

    Names are given in random order, so that a name tells nothing.
    """
    train, val = clips_per_identity(identities, rng).T
    wanted = round(30_541 / 45_472 * val.sum())
    stranger = np.minimum(rng.geometric(0.5, size=wanted), 60)
    stranger = stranger[: np.searchsorted(np.cumsum(stranger), wanted) + 1]
    stranger[-1] -= stranger.sum() - wanted
    listed, strangers = np.arange(identities), identities + np.arange(len(stranger))
    split = np.repeat(["train", "val", "val"], [train.sum(), val.sum(), wanted])
    person = np.repeat(np.concatenate([listed, listed, strangers]), np.concatenate([train, val, stranger]))
    parts = []
    for name in ("train", "val"):
        members = rng.permutation(np.flatnonzero(split == name))
        names = [f"IQIYI_VID_{name.upper()}_{i + 1:07d}" for i in range(len(members))]
        parts.append(pd.DataFrame({"clip": names, "split": name, "person": person[members]}))
    clips = pd.concat(parts, ignore_index=True)
    person = clips.pop("person").to_numpy()
    return clips.assign(identity=np.where(person < identities, person, -1).astype(np.int32)), person


def unit(x: np.ndarray) -> np.ndarray:
    """Scale the rows of (n, D) to length 1."""
    return x / np.sqrt(np.einsum("nd,nd->n", x, x))[:, None]


def unit_draws(n: int, sd: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw (n, D) directions, normal with standard deviations (D,) float32."""
    return unit(rng.standard_normal((n, len(sd)), dtype=np.float32) * sd)


def quantile(knots: Sequence[tuple[float, float]], z: np.ndarray) -> np.ndarray:
    """Map standard normal values to a distribution by its quantiles, linear between normal scores, constant beyond."""
    probability, value = np.array(knots, dtype=float).T
    return np.interp(z, normal.ppf(probability), value)


def noise_amplitude(latent: np.ndarray) -> np.ndarray:
    """Return the noise amplitude at a latent quality, 1 at the median, by log-linear interpolation of the knots."""
    probability, value = np.array(NOISE_KNOTS).T
    return np.exp(np.interp(latent, normal.ppf(probability), np.log(value))).astype(np.float32)


def draw_frames(uniform: np.ndarray) -> np.ndarray:
    """Map uniform draws to numbers of faces a clip, by the published survival function (log-interpolated)."""
    faces, survival = np.array(FRAME_SURVIVAL, dtype=float).T
    log_faces = np.interp(np.log(np.maximum(uniform, survival[-1])), np.log(survival[::-1]), np.log(faces[::-1]))
    return np.floor(np.exp(log_faces) + 1e-9).astype(np.int64)


def pick(weight: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one column index a row of (n, k) nonnegative weights, with probability in proportion."""
    cumulative = np.cumsum(weight, 1)
    return (cumulative < rng.random((len(weight), 1)) * cumulative[:, -1:]).sum(1)


def boxes(clip: np.ndarray, latent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw boxes (F, 4) in pixels of a 1280 x 720 picture: steady within a clip, larger with quality."""
    size = np.clip(np.round(110 * np.exp(0.3 * latent + 0.05 * rng.standard_normal(len(clip)))), 20, 600)
    n = clip.max() + 1 if len(clip) else 0
    centre = (rng.uniform(0.3, 0.7, (n, 2)) * [1280, 720])[clip] + 4 * rng.standard_normal((len(clip), 2))
    corner = np.clip(np.round(centre - size[:, None] / 2), 0, None)
    return np.hstack([corner, corner + size[:, None]])
