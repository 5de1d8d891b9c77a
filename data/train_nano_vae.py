"""Train nano's VAE on the procedural source: python data/train_nano_vae.py --minutes 90 --out FOLDER [--init FOLDER]

A piece of work fits a budget of CPU time (so it can share the machine): it starts from given weights, or new ones, with
a fresh optimizer and ends by writing better ones, scored on unseen songs. Interrupted, the same command goes on where
it was; --minutes 0 only scores.
"""

import argparse
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import lapped
import measures
import numpy as np
import torch
from diffusers import AutoencoderOobleck
from diffusers.models.autoencoders.autoencoder_oobleck import Snake1d
from procedural import HELD_OUT, song
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from acestep_lora.data import oobleck  # noqa: E402

RATE = 12000
HOP = 480
LATENTS = 48
SIZES = {
    "encoder_hidden_size": 2 * LATENTS,
    "downsampling_ratios": [4, 2, 6, 10],
    "channel_multiples": [1, 1, 2, 2],
    "decoder_channels": 48,
    "decoder_input_channels": LATENTS,
    "audio_channels": 2,
    "sampling_rate": RATE,
}
LOW = 36  # latents that are coefficients; then band levels, and the balance
# RMS of the bands' 95th percentile
LOUDNESS = (0.073, 0.056, 0.055, 0.048, 0.042, 0.038, 0.040, 0.034, 0.032, 0.028, 0.033)
STDS = torch.tensor([1.0] * LOW + [2.0] * (LATENTS - LOW))  # levels are heard through more noise than coefficients
SPECTRA = (4096, 2048, 1024, 512, 256, 128)  # samples of the windows
WEIGHTS = {"root": 0.5, "log": 0.2, "bands": 0.5, "phase": 0.5, "harmony": 1.0, "rises": 1.0}
PHASE_LIMIT = LOW * RATE // (2 * HOP)  # Hz, where coefficients end
NOISE = 0.05  # std of the posterior, where that of the latents is 1
PATH = 0.5  # of the learning rate, for what is no residual unit
POOL = 160  # songs in memory; every step replaces one
SHOWN = 25  # steps between lines of the log
SAVED = 300  # seconds between checkpoints
UNSEEN = 10_000_000  # seeds from here on are for scoring


@dataclass
class Options:
    minutes: float
    out: Path
    init: Path | None
    lr: float
    batch: int
    crop: float  # seconds
    seed: int
    clips: int


class Pool:
    """An endless stream of crops, drawn from songs that are made as it goes."""

    def __init__(self, seed: int, size: int):
        self.rng, self.next = np.random.default_rng(seed), seed * 1_000_000
        self.songs = [self._song() for _ in range(size)]

    def _song(self) -> np.ndarray:
        self.next += 1
        return song(self.next, RATE)[0]

    def crops(self, count: int, length: int) -> Tensor:
        """[count, 2, length]."""
        self.songs[self.next % len(self.songs)] = self._song()
        found = []
        for index in self.rng.choice(len(self.songs), count, replace=False):
            start = int(self.rng.integers(len(self.songs[index]) - length))
            crop = self.songs[index][start : start + length, :: int(self.rng.choice((1, -1)))]
            found.append(crop * self.rng.uniform(0.4, 1.1))
        return torch.from_numpy(np.stack(found).astype(np.float32)).transpose(1, 2).contiguous()


@torch.no_grad()
def new_vae(seed: int, songs: int = 24) -> AutoencoderOobleck:
    """The codec of lapped.py, its latents of mean 0 and STDS over songs, a posterior of constant width.

    Its encoder is final.
    """
    torch.manual_seed(seed)
    vae = AutoencoderOobleck(**SIZES)
    lapped.initialise(vae, LOW, list(LOUDNESS))
    vae.encoder.requires_grad_(False)
    clips = [song(UNSEEN - 1 - i, RATE)[0][: 8 * RATE].T for i in range(songs)]
    fold_scale(vae, torch.from_numpy(np.stack([clip for clip in clips if clip.shape[1] == 8 * RATE])))
    vae.encoder.conv2.weight_g[LATENTS:] = 0
    vae.encoder.conv2.bias[LATENTS:] = math.log(math.expm1(NOISE))  # softplus gives it back
    return vae


def losses(vae: AutoencoderOobleck, audio: Tensor) -> dict[str, Tensor]:
    """Distances of spectra, relative to their mean.

    Square roots of magnitudes weigh loud partials and quiet ones about as the ear does, logarithms the quiet; bands
    keep the level where partials cannot be met; pitch classes keep the harmony, rises the onsets. Phase counts for the
    middle channel below PHASE_LIMIT, where the latents tell it.
    """
    decoded = vae.decode(vae.encode(audio).latent_dist.sample()).sample
    parts = dict.fromkeys(("root", "log", "bands", "phase"), 0.0)
    for size in SPECTRA:
        a, b = measures.spectra(decoded, size), measures.spectra(audio, size)
        size_a, size_b = measures.magnitudes(a), measures.magnitudes(b)
        root_a, root_b = size_a.sqrt(), size_b.sqrt()
        parts["root"] += _off(root_a, root_b) / len(SPECTRA)
        parts["log"] += measures.log_distance(size_a, size_b) / len(SPECTRA)
        if size >= 512:
            loud_a, loud_b = ((measures.bands(each[:, 2], RATE) + 1e-8) ** 0.5 for each in (size_a, size_b))
            parts["bands"] += _off(loud_a, loud_b) / 4
            low = slice(0, PHASE_LIMIT * size // RATE)
            difference = measures.magnitudes((a / root_a - b / root_b)[:, 2, low])
            parts["phase"] += difference.mean() / root_b[:, 2, low].mean() / 4
        if size == 4096:
            parts["harmony"] = _off(*(measures.harmony(each[:, 2], RATE) for each in (size_a, size_b)))
    parts["rises"] = _off(*(measures.rises(each.mean(1), RATE) for each in (decoded, audio)))
    return {name: WEIGHTS[name] * part for name, part in parts.items()}


def _off(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().mean() / b.mean()


# ---------------------------------------------------------------- weights on disk


def copied(vae: AutoencoderOobleck) -> AutoencoderOobleck:
    """Weight normalisation leaves tensors behind that deepcopy refuses."""
    twin = AutoencoderOobleck.from_config(vae.config)
    twin.load_state_dict(vae.state_dict())
    return twin.requires_grad_(False)


def save(vae: AutoencoderOobleck, folder: Path) -> None:
    """bf16, replaced whole."""
    temporary = folder.with_name(f"{folder.name}.new")
    copied(vae).to(torch.bfloat16).save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


@torch.no_grad()
def fold_scale(vae: AutoencoderOobleck, audio: Tensor) -> None:
    """Give the latents of `audio` mean 0 and STDS per channel; what the decoder makes of them stays the same."""
    mean = torch.cat([vae.encode(clip[None]).latent_dist.mean for clip in audio])
    shift, scale = mean.mean((0, 2)), mean.std((0, 2)) / STDS
    last, first = vae.encoder.conv2, vae.decoder.conv1
    # Decoder: conv(z) = conv'((z - shift) / scale). Its padding zeros mean `shift` now, which only the ends hear.
    weight = first.weight_v * (first.weight_g / first.weight_v.norm(dim=(1, 2), keepdim=True))
    first.bias += torch.einsum("oik,i->o", weight, shift)
    weight = weight * scale[None, :, None]
    first.weight_v.copy_(weight)
    first.weight_g.copy_(weight.norm(dim=(1, 2), keepdim=True))
    last.bias[:LATENTS] = (last.bias[:LATENTS] - shift) / scale
    last.weight_g[:LATENTS] /= scale[:, None, None]


# ---------------------------------------------------------------- training


class Training:
    """Weights, their moving average, the optimizer, and how much of the budget is spent."""

    def __init__(self, options: Options) -> None:
        self.options, self.file = options, options.out / "state.pt"
        stored = options.init and AutoencoderOobleck.from_pretrained(options.init, torch_dtype=torch.float32)
        self.vae = stored or new_vae(options.seed)
        self.average = copied(self.vae)
        oobleck.streamline(self.vae.encoder.requires_grad_(False))
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.99), weight_decay=1e-3)
        self.step, self.spent = 0, 0.0
        if self.file.is_file():
            kept = torch.load(self.file, weights_only=True)
            for name, part in self._parts().items():
                part.load_state_dict(kept[name])
            self.step, self.spent = kept["step"], kept["spent"]
        self.begun = time.process_time() - self.spent
        self.pool = Pool(options.seed * 1000 + self.step % 1000 + 1, POOL)

    def _parts(self) -> dict:
        return {"decoder": self.vae.decoder, "average": self.average.decoder, "optimizer": self.optimizer}

    def _groups(self) -> list[dict]:
        """The written codec learns slower than the units beside it: large steps would first make noise of it."""
        named = dict(self.vae.decoder.named_parameters())
        units = [value for name, value in named.items() if "res_unit" in name]
        path = [value for name, value in named.items() if "res_unit" not in name]
        return [{"params": units, "share": 1.0}, {"params": path, "share": PATH}]

    def save(self) -> None:
        save(self.average, self.options.out / "vae")
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        temporary = self.file.with_suffix(".new")
        torch.save(parts | {"step": self.step, "spent": self.spent}, temporary)
        temporary.replace(self.file)

    @property
    def progress(self) -> float:
        return self.spent / (60 * self.options.minutes) if self.options.minutes else 1.0

    def learning_rate(self) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1, self.progress)))
        return self.options.lr * min(1, (self.step + 1) / 50) * (0.02 + 0.98 * cosine)

    def advance(self) -> dict[str, float]:
        """One step -> what it measured."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate() * group["share"]
        audio = self.pool.crops(self.options.batch, round(self.options.crop * RATE / HOP) * HOP)
        parts = losses(self.vae, audio)
        self.optimizer.zero_grad()
        sum(parts.values()).backward()
        parts["norm"] = torch.nn.utils.clip_grad_norm_(self.vae.decoder.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(0.998, self.step / (self.step + 20))
        with torch.no_grad():
            pair = [list(vae.decoder.parameters()) for vae in (self.average, self.vae)]
            torch._foreach_lerp_(*pair, 1 - decay)
        self.spent = time.process_time() - self.begun
        return {name: value.item() for name, value in parts.items()}

    def run(self) -> AutoencoderOobleck:
        """Until the budget is spent -> the averaged weights."""
        seen, saved = [], time.monotonic()
        while self.progress < 1:
            seen.append(self.advance())
            if len(seen) == SHOWN:
                means = " ".join(f"{name} {np.mean([row[name] for row in seen]):.4f}" for name in seen[0])
                print(f"step {self.step} {self.spent / 60:.1f} min {means}", flush=True)
                seen = []
            if time.monotonic() - saved > SAVED:
                self.save()
                saved = time.monotonic()
        return self.average


# ---------------------------------------------------------------- scoring


def whole_frames(audio: np.ndarray) -> np.ndarray:
    """[n, 2] -> [2, m], m a multiple of HOP."""
    return np.ascontiguousarray(audio[: len(audio) // HOP * HOP].T)


@torch.no_grad()
def reconstruct(vae: AutoencoderOobleck, audio: np.ndarray) -> np.ndarray:
    """[2, n] -> [2, n]."""
    return vae.decode(vae.encode(torch.from_numpy(audio)[None]).latent_dist.mean).sample[0].numpy()


def score(vae: AutoencoderOobleck, clips: int, style: str | None = None) -> dict[str, float]:
    """Means over unseen songs: reconstruction against original, and onsets heard in either against the truth."""
    rows = []
    for seed in range(UNSEEN, UNSEEN + clips):
        audio, truth = song(seed, RATE, style)
        audio = whole_frames(audio)
        copied = reconstruct(vae, audio)
        heard, again, true = measures.onsets(audio, RATE), measures.onsets(copied, RATE), np.array(truth.onsets)
        rows.append(
            {
                "chroma_correlation": measures.chroma_correlation(audio, copied, RATE),
                "onset_f": measures.f_measure(again, heard),
                "onset_f_truth": measures.f_measure(again, true),
                "onset_f_truth_original": measures.f_measure(heard, true),
                "spectral_distance": measures.spectral_distance(copied, audio),
                "mean_frame_distance": measures.mean_frame_distance(audio),
            }
        )
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=float, default=1.28, help="seconds")
    parser.add_argument("--seed", type=int, default=0, help="another one for each piece: other songs")
    parser.add_argument("--clips", type=int, default=50, help="unseen songs to score on")
    return Options(**vars(parser.parse_args()))


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    if shutil.which("g++") and sys.platform == "linux":
        Snake1d.forward = torch.compile(Snake1d.forward, dynamic=True)  # half the time of a step
    vae = Training(options).run()
    save(vae, options.out / "vae")
    (options.out / "state.pt").unlink(missing_ok=True)
    stored = AutoencoderOobleck.from_pretrained(options.out / "vae", torch_dtype=torch.float32)
    results = {
        "trained": score(stored, options.clips),
        "untrained": score(new_vae(options.seed), options.clips),
        f"trained, {HELD_OUT}": score(stored, options.clips // 2, HELD_OUT),
    }
    report = {"options": {k: str(v) for k, v in asdict(options).items()}, "scores": results}
    (options.out / "scores.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(parse())
