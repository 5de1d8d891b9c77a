"""Did it work, and how strongly to use it: python -m acestep_lora.evaluate adapter.path=[a,b] dataset.dir=/music/mine

Adapters are measured side by side, at several strengths and against the base model: the loss on songs they were not
trained on, on the same crops and noise; and clips generated from those songs' own words and from the same seeds, by how
near they are to the songs (`distance`) and whether they keep the tempo and key that was asked for.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import peft
import soxr
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track as progress
from rich.table import Table
from torch import Tensor

from acestep_lora import adapters, cli, distance, generation, pages, pictures, runs
from acestep_lora.adapter_files import has_scale, set_scale
from acestep_lora.annotate import tempo, tempo_key
from acestep_lora.basemodel import BaseModel
from acestep_lora.data.datamodule import LatentDataModule
from acestep_lora.data.draws import Draw
from acestep_lora.data.items import VAL_TIMESTEPS, Song, ValSongs, collate
from acestep_lora.errors import UserError
from acestep_lora.hardware import Hardware
from acestep_lora.hashes import write_atomic
from acestep_lora.module import FlowModule
from acestep_lora.pages import Card, Section
from acestep_lora.pictures import Panel
from acestep_lora.randomness import key

BASE = "base model"


@dataclass(frozen=True)
class Row:
    """What was measured of one adapter at one strength; None where nothing was.

    losses: by VAL_TIMESTEPS; error: standard error of the loss's difference from the base model's; distance, clap:
    Fréchet distances from the songs; bpm, key: share of the clips that have what was asked for.
    """

    adapter: str
    scale: float
    losses: list[float]
    error: float
    distance: float | None = None
    clap: float | None = None
    bpm: float | None = None
    key: float | None = None

    @property
    def loss(self) -> float:
        return fmean(self.losses)

    @property
    def name(self) -> str:
        return self.adapter if self.adapter == BASE else f"{self.adapter} at {self.scale:g}"


# ---------------------------------------------------------------- what is measured


class Clap:
    """Embeddings of a CLAP model from a local folder: [n, d], one for every ten seconds of a clip."""

    def __init__(self, folder: str, device: str) -> None:
        from transformers import ClapFeatureExtractor, ClapModel

        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.model = ClapModel.from_pretrained(folder, use_safetensors=True, **local).to(device).eval()
            self.extract = ClapFeatureExtractor.from_pretrained(folder, **local)
        except (OSError, ValueError) as error:
            raise UserError(f"clap={folder} is not a CLAP model: {str(error).splitlines()[0]}") from None

    @torch.no_grad()
    def __call__(self, clip: np.ndarray, rate: int) -> np.ndarray:
        wanted = self.extract.sampling_rate
        mono = soxr.resample(clip.mean(axis=0), rate, wanted)
        length = self.extract.nb_max_samples
        pieces = [mono[i : i + length] for i in range(0, max(1, len(mono) - length + 1), length)]
        inputs = self.extract(pieces, sampling_rate=wanted, return_tensors="pt")
        found = self.model.get_audio_features(**inputs.to(self.model.device))
        return getattr(found, "pooler_output", found).float().cpu().numpy()  # a bare tensor before transformers 5


@torch.no_grad()
def losses(
    module: FlowModule, songs: list[Song], hardware: Hardware, seed: int, repeats: int, crop_frames: int | None
) -> Tensor:
    """The flow-matching loss of every draw and timestep, [repeats * songs, levels]; the first repeat's is val/loss."""
    rows = []
    for repeat in range(repeats):
        grid = ValSongs(songs, key(seed, "evaluate", repeat) if repeat else seed, crop_frames)
        draws = [Draw(i, 0, 0, level, 0) for i in range(len(songs)) for level in range(len(VAL_TIMESTEPS))]
        for draw in progress(draws, f"loss, {repeat + 1} of {repeats}"):
            batch = collate([grid[draw]]).to(module.device)
            with hardware.autocast(module.device):
                rows.append(module.losses(batch).float().cpu())
    return torch.cat(rows).view(-1, len(VAL_TIMESTEPS))


def generated(pipeline, requests: Sequence[generation.Request]) -> list[np.ndarray]:
    """A clip [2, n] for every seed of every request."""
    return [clip.numpy() for request in progress(requests, "clips") for clip in generation.generate(pipeline, request)]


@torch.no_grad()
def played(pipeline, songs: list[Song], seconds: float, count: int) -> list[np.ndarray]:
    """At most `count` parts of the songs, [2, n] of `seconds` each, as the VAE renders them.

    From their latents: what the VAE loses, no adapter can bring back.
    """
    length = round(seconds * pipeline.latents_per_second)
    places = [(song, start) for song in songs for start in range(0, max(1, song.entry.frames - length + 1), length)]
    chosen = [places[i] for i in np.linspace(0, len(places) - 1, min(count, len(places))).astype(int)]
    parts = [song.entry.read("latents.mean", start, start + length) for song, start in chosen]
    return [generation.decode(pipeline, part).numpy() for part in parts]


def adherence(clips: Sequence[np.ndarray], rate: int, wanted: Sequence[Song], name: str) -> float | None:
    """Share of the clips whose `name`, "bpm" or "keyscale", is heard as their song has it; None where no song has."""
    told = [(clip, getattr(song.track, name)) for clip, song in zip(clips, wanted, strict=True)]
    heard = [
        (tempo_key.estimate(soxr.resample(clip.T, rate, tempo.RATE)).values.get(name), value)
        for clip, value in told
        if value
    ]
    return (
        fmean(found is not None and tempo_key.agrees(name, found, value) for found, value in heard) if heard else None
    )


# ---------------------------------------------------------------- adapters side by side


class Judge:
    """Measures adapters on the same songs with the same noise, words and seeds."""

    def __init__(self, cfg: DictConfig, base: BaseModel, hardware: Hardware, data: LatentDataModule) -> None:
        songs = data.songs if cfg.songs == "all" else data.val_set.songs
        self.which = "all of them" if cfg.songs == "all" else "held out" if data.seen else "none was held out"
        self.cfg, self.base, self.hardware, self.songs, self.crop_frames = cfg, base, hardware, songs, data.crop_frames
        self.clap = Clap(cfg.clap, hardware.device) if cfg.clap else None
        self.wanted = sorted(
            (songs[i % len(songs)] for i in range(cfg.clips)), key=songs.index
        )  # the song of each clip
        self.kept = sorted({0, cfg.clips - 1}) if cfg.clips else []  # of the first song and of the last
        self.folder = Path(cfg.output_dir).expanduser()
        self.pipeline, self.base_losses = None, None
        self.heard: dict[str, list[Path]] = {}  # row -> files

    def module(self, path: str) -> FlowModule:
        """The transformer with an adapter on it."""
        adapter = adapters.Adapter(partial(peft.PeftConfig), init_from=path)
        options = {"dtype": self.hardware.dtype, "attention": self.hardware.attention}
        module = FlowModule(self.base, adapter, torch.optim.SGD, quantize=self.cfg.model.quantize, **options)
        module.load(torch.device(self.hardware.device))
        return module.to(self.hardware.device).eval()

    def rows(self, name: str, path: str) -> Iterator[Row]:
        """The base model, the first time, and the adapter at every strength."""
        module = self.module(path)
        if self.base_losses is None:
            with adapters.disabled(module.dit):
                yield self.row(module, BASE, 0.0)
        scales = [float(scale) for scale in cli.as_list(self.cfg.adapter.scale) if scale]
        for scale in scales if has_scale(module.dit) else [1.0]:
            set_scale(module.dit, scale)
            yield self.row(module, name, scale)
        if self.pipeline:
            self.pipeline.transformer = None  # gone before the next adapter's is read

    def row(self, module: FlowModule, name: str, scale: float) -> Row:
        cfg = self.cfg
        found = losses(module, self.songs, self.hardware, cfg.seed, cfg.repeats, self.crop_frames)
        self.base_losses = found if self.base_losses is None else self.base_losses
        error = (found - self.base_losses).mean(dim=1).std(correction=min(1, len(found) - 1)) / len(found) ** 0.5
        row = Row(name, scale, found.mean(dim=0).tolist(), float(error))
        return Row(**asdict(row) | self.listen(module, row)) if cfg.clips else row

    def listen(self, module: FlowModule, row: Row) -> dict[str, float | None]:
        """What is heard in clips of the module as it is."""
        transformer = generation.Sampled(module.dit, partial(self.hardware.autocast, module.device))
        if self.pipeline is None:
            device, token = self.hardware.device, self.cfg.model.timbre_token
            self.pipeline = generation.pipeline_around(transformer, self.base, self.hardware.dtype, device, token)
            self.pipeline.set_progress_bar_config(disable=True)
            self.real = self._described(played(self.pipeline, self.songs, self.cfg.duration, max(16, self.cfg.clips)))
        self.pipeline.transformer = transformer
        clips, rate = generated(self.pipeline, self.requests()), self.pipeline.sample_rate
        folder = self.folder / "clips" / row.name
        self.heard[row.name] = [
            generation.write_audio(folder / f"{i + 1}.wav", torch.from_numpy(clips[i]), rate) for i in self.kept
        ]
        found = self._described(clips)
        return {
            **{measure: distance.frechet(gaussian, self.real[measure]) for measure, gaussian in found.items()},
            "bpm": adherence(clips, rate, self.wanted, "bpm"),
            "key": adherence(clips, rate, self.wanted, "keyscale"),
        }

    def requests(self) -> list[generation.Request]:
        """A song's own words for every clip, and seeds that are all different."""
        cfg, seeds = self.cfg, {}
        for i, song in enumerate(self.wanted):
            seeds.setdefault(self.songs.index(song), []).append(cfg.seed + i)
        return [generation.Request.like(self.songs[i].track, cfg, cfg.duration, own) for i, own in seeds.items()]

    def _described(self, clips: Sequence[np.ndarray]) -> dict[str, distance.Gaussian]:
        """How clips are distributed, by measure."""
        found = {}
        for measure, features in {"distance": distance.features, "clap": self.clap}.items():
            if features:
                rows = np.concatenate([features(clip, self.pipeline.sample_rate) for clip in clips])
                if len(rows) < 2:
                    raise UserError(
                        f"{len(clips)} clips are too few for the {measure}: give more songs, or longer ones."
                    )
                found[measure] = distance.fit(rows)
        return found


# ---------------------------------------------------------------- what is told


HEARD_AS = {"distance": "{:.0f}", "CLAP": "{:.3f}", "BPM": "{:.0%}", "key": "{:.0%}"}
"""Columns of what is heard; in lower case, attributes of a row."""
MEASURES = {
    "loss": "has the lowest loss,",
    "distance": "sounds nearest to the songs, at a distance of",
    "clap": "sounds nearest to the songs to CLAP, at a distance of",
}


def measured(rows: Sequence[Row], measure: str) -> bool:
    return getattr(rows[0], measure) is not None


def best(rows: Sequence[Row], measure: str) -> Row:
    """The row with the least of a measure, the base model included."""
    return min(rows, key=lambda row: getattr(row, measure))


def verdicts(rows: Sequence[Row]) -> list[str]:
    """One sentence for each measure."""
    told, base = [], rows[0]
    for measure, words in MEASURES.items():
        row = best(rows, measure) if measured(rows, measure) else None
        if row is base:
            told.append(f"By {measure}, none beats the base model.")
        elif row:
            value, plain = getattr(row, measure), getattr(base, measure)
            told.append(f"{row.name} {words} {value:.4g}: {1 - value / plain:.1%} under the base model.")
    return told


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Rows as text, the lowest loss first, below a head."""
    base, heard = rows[0], {name: shape for name, shape in HEARD_AS.items() if measured(rows, name.lower())}
    head = ("adapter", "strength", "loss", "vs base", *(f"t={t}" for t in VAL_TIMESTEPS), *heard)
    lines = []
    for row in sorted(rows, key=lambda row: row.loss):
        change = "" if row is base else f"{row.loss / base.loss - 1:+.1%} ± {row.error / base.loss:.1%}"
        values = [shape.format(getattr(row, name.lower())) for name, shape in heard.items()]
        losses = [f"{loss:.4f}" for loss in (row.loss, *row.losses)]
        lines.append((row.adapter, f"{row.scale:g}", losses[0], change, *losses[1:], *values))
    return [head, *lines]


def panels(rows: Sequence[Row]) -> list[Panel]:
    base, names = rows[0], list(dict.fromkeys(row.adapter for row in rows[1:]))
    own = {name: [base, *(row for row in rows if row.adapter == name)] for name in names}
    best_of = {name: min(found[1:], key=lambda row: row.loss) for name, found in own.items()}
    by_time = {
        name: (VAL_TIMESTEPS, [1 - a / b for a, b in zip(row.losses, base.losses, strict=True)])
        for name, row in best_of.items()
    }
    shown = [Panel("loss saved by noise level, at the best strength", "t (1 is pure noise)", by_time)]
    for measure, title in {
        "loss": "loss",
        "distance": "distance from the songs",
        "clap": "CLAP distance",
    }.items():
        if measured(rows, measure):
            curves = {
                name: ([row.scale for row in found], [getattr(row, measure) for row in found])
                for name, found in own.items()
            }
            shown.append(Panel(title, "strength", curves))
    return shown


def write(cfg: DictConfig, judge: Judge, rows: Sequence[Row]) -> list[Path]:
    """evaluation.json, .png and .html."""
    folder, picture = judge.folder, pictures.draw_curves(panels(rows))
    settings = OmegaConf.to_container(cfg, resolve=True)
    told = {"settings": settings, "rows": [asdict(row) | {"loss": row.loss} for row in rows]}
    write_atomic(folder / "evaluation.json", json.dumps(told, indent=2, ensure_ascii=False).encode())
    write_atomic(folder / "evaluation.png", picture)
    page = folder / "evaluation.html"
    grid = {
        f"{judge.wanted[i].track.caption} (seed {cfg.seed + i})": {
            name: Card(name, pages.link(files[n], page), pictures.draw(files[n]).png)
            for name, files in judge.heard.items()
        }
        for n, i in enumerate(judge.kept)
    }
    facts = {"songs": f"{len(judge.songs)}, {judge.which}", "clips each": str(cfg.clips), "model": cfg.model.name}
    sections = [
        Section("In short", points=verdicts(rows)),
        Section("By strength", NOTE, figures={"curves by strength": picture}, table=table(rows)),
    ]
    if grid:
        sections.append(Section("Listen", "The same words and seeds.", grid=grid))
    return [
        folder / "evaluation.json",
        folder / "evaluation.png",
        pages.write_page(page, "Evaluation", facts, sections),
    ]


NOTE = (
    "Loss: always with the same noise; ± is its standard error against the base model. Distance: "
    "Fréchet distance of log-mel statistics between clips and songs. BPM, key: clips that kept what was asked for."
)


def evaluate(cfg: DictConfig) -> tuple[Judge, list[Row]]:
    """Measure every adapter -> its judge, and rows of which the first is the base model."""
    if cfg.songs not in ("held_out", "all"):
        raise UserError(f"songs={cfg.songs} is neither held_out nor all.")
    paths = [str(path) for path in cli.as_list(cfg.adapter.path)]
    for path in paths:
        if not Path(path).expanduser().exists():
            raise UserError(f"adapter.path={path} does not exist: give an adapter's folder or .safetensors file.")
    named = dict(zip(runs.labels(paths), paths, strict=True))
    hardware, base = instantiate(cfg.hardware), runs.find_base(cfg.model)
    data = runs.songs(cfg, base, hardware)
    data.encode(**hardware.trainer_options())
    data.setup("validate")
    judge = Judge(cfg, base, hardware, data)
    rows = [row for name, path in named.items() for row in judge.rows(name, path)]
    return judge, rows


def main(cfg: DictConfig) -> int:
    judge, rows = evaluate(cfg)
    head, *lines = table(rows)
    shown = Table(*head)
    for line in lines:
        shown.add_row(*line)
    Console(width=None if os.isatty(1) else 160).print(shown)
    print(*verdicts(rows), *write(cfg, judge, rows), sep="\n")
    return 0


if __name__ == "__main__":
    cli.main("evaluate", main)
