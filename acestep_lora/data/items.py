"""One song -> one item, items -> a batch. Everything random about an item is drawn here: a training step is pure.

Draws are keyed by (seed, epoch, the item's position in the epoch's global order, track id): they do not depend on rank,
worker, or how the epoch is cut into batches, which makes resuming exact.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import Dataset

from acestep_lora.data import lines
from acestep_lora.data.cache import Entry
from acestep_lora.data.draws import Draw
from acestep_lora.data.track import Track
from acestep_lora.randomness import generator, key

VAL_TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass
class Batch:
    """Items ready for one step, padded on the right.

    latents, noise [b, t, c]; t [b]; condition [b, l, d]; frames, weight [b]; dropped [b] bool (trained without
    condition); hints [b, t, c] with hinted [b] bool, or None; condition_mask [b, l] and frame_mask [b, t] bool, None
    when nothing is padded. `window` counts the items of the optimizer step this batch belongs to, over all ranks;
    `key` seeds what the model itself draws (adapter dropout); `level` [b] indexes VAL_TIMESTEPS in validation,
    counted on for songs that are trained on; `tracks` names the items. prior [b, p, d], prior_mask [b, p]: condition of
    another prompt for each item, or None.
    """

    latents: Tensor
    noise: Tensor
    t: Tensor
    condition: Tensor
    frames: Tensor
    weight: Tensor
    dropped: Tensor
    hinted: Tensor
    level: Tensor
    hints: Tensor | None
    condition_mask: Tensor | None
    frame_mask: Tensor | None
    window: int
    key: int
    tracks: list[str]
    prior: Tensor | None = None
    prior_mask: Tensor | None = None

    def to(self, device, non_blocking: bool = False) -> "Batch":
        moved = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        pinned = {f.name: v.pin_memory() for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **pinned)

    @property
    def padding(self) -> float:
        """Share of the frames that are padding."""
        return 1 - float(self.frames.sum()) / self.latents.shape[:2].numel()


def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """[n_i, d] each -> [b, n, d] and a mask [b, n] of the real rows, None when no row is padding."""
    lengths = torch.tensor([len(row) for row in rows])
    stacked = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return stacked, None if lengths.min() == lengths.max() else torch.arange(stacked.shape[1]) < lengths.unsqueeze(1)


def collate(items: list[dict]) -> Batch:
    latents, frame_mask = pad([item["latents"] for item in items])
    condition, condition_mask = pad([item["condition"] for item in items])
    hinted = torch.tensor([item["hints"] is not None for item in items])
    hints = None
    if hinted.any():
        hints = pad([item["latents"] * 0 if item["hints"] is None else item["hints"] for item in items])[0]
    first = items[0]
    prior, prior_mask = pad([item["prior"] for item in items]) if "prior" in first else (None, None)
    return Batch(
        latents=latents,
        noise=pad([item["noise"] for item in items])[0],
        t=torch.tensor([item["t"] for item in items]),
        condition=condition,
        frames=torch.tensor([len(item["latents"]) for item in items]),
        weight=torch.tensor([item["weight"] for item in items]),
        dropped=torch.tensor([item["dropped"] for item in items]),
        hinted=hinted,
        level=torch.tensor([item["level"] for item in items]),
        hints=hints,
        condition_mask=condition_mask,
        frame_mask=frame_mask,
        window=first["window"],
        key=first["key"],
        tracks=[item["track"] for item in items],
        prior=prior,
        prior_mask=prior_mask,
    )


@dataclass
class Song:
    track: Track
    entry: Entry

    @cached_property
    def windows(self) -> list[int]:
        """Which conditions each window of the song has; empty where those of the whole song are every crop's."""
        return json.loads(self.entry.header.get("windows", "[]"))

    def has(self, variant: str) -> bool:
        return f"condition.{variant}{'@0' if self.windows else ''}" in self.entry.names


class Songs(Dataset):
    """What training and validation items have in common: reading a song's latents and condition.

    prior: conditions [l, d] of other prompts, of which each item carries one; empty: none does.
    """

    def __init__(self, songs: list[Song], seed: int, crop_frames: int | None, prior: Sequence[Tensor] = ()) -> None:
        self.songs, self.seed, self.crop_frames, self.prior = songs, seed, crop_frames, prior

    def length(self, i: int) -> int:
        frames = self.songs[i].entry.frames
        return min(frames, self.crop_frames) if self.crop_frames else frames

    def _crop(self, i: int, names: tuple) -> tuple[int, str]:
        """First frame, and what the names of its conditions end with: anywhere, or a window with words of its own."""
        song, crops = self.songs[i], generator(self.seed, "crop", *names)
        if song.windows:
            number = int(torch.randint(len(song.windows), (1,), generator=crops))
            return lines.starts(song.entry.frames, self.crop_frames)[number], f"@{song.windows[number]}"
        return int(torch.randint(song.entry.frames - self.length(i) + 1, (1,), generator=crops)), ""

    def _item(self, i: int, names: tuple, variant: str, hinted: bool) -> dict:
        """Crop, posterior sample and noise of song i, from generators keyed by `names`."""
        song = self.songs[i]
        start, window = self._crop(i, names)
        stop = start + self.length(i)
        with song.entry.reader() as read:
            mean, std = read("latents.mean", start, stop), read("latents.std", start, stop)
            condition = read(f"condition.{variant}{'_hint' if hinted else ''}{window}")
            hints = read("hints", start, stop) if hinted else None
        posterior = torch.randn(mean.shape, generator=generator(self.seed, "posterior", *names))
        return {
            "latents": mean + std * posterior,
            "noise": torch.randn(mean.shape, generator=generator(self.seed, "noise", *names)),
            "condition": condition,
            "hints": hints,
            "track": song.track.id,
        } | self._other(names)

    def _other(self, names: tuple) -> dict[str, Tensor]:
        if not self.prior:
            return {}
        return {
            "prior": self.prior[
                int(torch.randint(len(self.prior), (1,), generator=generator(self.seed, "prior", *names)))
            ]
        }


class TrainSongs(Songs):
    """Items of the training epochs, addressed by Draw."""

    def __init__(
        self,
        songs: list[Song],
        seed: int,
        crop_frames: int | None,
        timesteps: Callable[[Tensor], Tensor],
        stratify: bool,
        condition_dropout: float,
        genre_ratio: float,
        lm_hints: float,
        prior: Sequence[Tensor] = (),
    ) -> None:
        super().__init__(songs, seed, crop_frames, prior)
        self.timesteps, self.stratify, self.condition_dropout = timesteps, stratify, condition_dropout
        self.genre_ratio, self.lm_hints = genre_ratio, lm_hints

    def __getitem__(self, draw: Draw) -> dict:
        song = self.songs[draw.track]
        names = (draw.epoch, draw.position, song.track.id)
        genre, dropped, hinted, u = torch.rand(4, generator=generator(self.seed, "choices", *names)).tolist()
        prompt = song.track.prompt_override or ("genre" if genre < self.genre_ratio / 100 else "caption")
        variant = prompt if song.has(prompt) else "caption"
        hinted = hinted < self.lm_hints and "hints" in song.entry.names
        if self.stratify:
            u = (self._stratum(draw) + u) / draw.window
        return self._item(draw.track, names, variant, hinted) | {
            "t": self.timesteps(torch.tensor([u])).item(),
            "dropped": dropped < self.condition_dropout,
            "weight": draw.weight,
            "level": 0,
            "window": draw.window,
            "key": key(self.seed, "model", draw.epoch, draw.position),
        }

    def _stratum(self, draw: Draw) -> int:
        """Each item of an optimizer window takes its timestep from another n-th of the distribution."""
        window = generator(self.seed, "strata", draw.epoch, draw.position - draw.slot)
        return int(torch.randperm(draw.window, generator=window)[draw.slot])


class ValSongs(Songs):
    """The fixed grid: every song at every validation timestep, always with the same crop, sample and noise."""

    def __getitem__(self, draw: Draw) -> dict:
        level = draw.slot % len(VAL_TIMESTEPS)
        names = ("val", level, self.songs[draw.track].track.id)
        return self._item(draw.track, names, "caption", hinted=False) | {
            "t": VAL_TIMESTEPS[level],
            "dropped": False,
            "weight": draw.weight,
            "level": draw.slot,
            "window": 0,
            "key": 0,
        }
