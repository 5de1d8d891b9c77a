"""Does nano play what its prompt asks for? python data/score_nano.py --model FOLDER [--clips 64]

Prompts are those of unseen songs. The instrument is heard by a classifier trained on real songs as the VAE renders
them, the tempo by the estimator of annotate.py; both are scored on unseen real songs too, rendered, and on other songs'
prompts (chance). The flow-matching loss on the unseen songs is given beside those of nano without its prompt, with
another song's, and of a transformer that was never trained.
"""

import argparse
import json
import sys
from pathlib import Path

import librosa
import numpy as np
import soxr
import torch
from diffusers import AceStepTransformer1DModel
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from procedural import Truth, song  # noqa: E402
from procedural.styles import LEADS  # noqa: E402
from train_nano_vae import RATE, UNSEEN, reconstruct, whole_frames  # noqa: E402

from acestep_lora import basemodel, flow, generation  # noqa: E402
from acestep_lora.annotate import tempo  # noqa: E402
from acestep_lora.annotate.tempo_key import estimate  # noqa: E402
from acestep_lora.conditioning import silence_context  # noqa: E402
from acestep_lora.timesteps import LogitNormal  # noqa: E402

NANO = OmegaConf.load(ROOT / "conf" / "model" / "nano.yaml")
LEARN = 20_000_000  # first seed of the classifier's songs
HEARD = 6  # seconds of a song that it hears, after the first
LEVELS = 16  # of noise, at which each song's loss is taken


def features(audio: np.ndarray) -> np.ndarray:
    """Mean, spread and movement of 64 log-mel bands, [192], of what is heard of audio [2, n]; loudness is taken out."""
    y = audio[:, RATE : (1 + HEARD) * RATE].mean(0)
    mel = librosa.feature.melspectrogram(y=y, sr=RATE, n_fft=1024, hop_length=256, n_mels=64, fmin=60)
    logs = np.log(mel + 1e-5 * mel.max())
    mean = logs.mean(1)
    return np.concatenate([mean - mean.mean(), logs.std(1), np.abs(np.diff(logs, axis=1)).mean(1)])


class Classifier:
    """Softmax regression on standardised features."""

    def __init__(self, rows: np.ndarray, labels: list[int], decay: float = 1e-2) -> None:
        self.mean, self.std = rows.mean(0), rows.std(0) + 1e-6
        x, y = self._scaled(rows), torch.tensor(labels)
        self.layer = torch.nn.Linear(x.shape[1], max(labels) + 1)
        optimizer = torch.optim.LBFGS(self.layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(self.layer(x), y) + decay * self.layer.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    def _scaled(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(((rows - self.mean) / self.std).astype(np.float32))

    @torch.no_grad()
    def __call__(self, rows: np.ndarray) -> list[int]:
        return self.layer(self._scaled(rows)).argmax(1).tolist()


def learn_instruments(vae, count: int) -> Classifier:
    rows, labels = [], []
    for seed in tqdm(range(LEARN, LEARN + count), desc="songs of the classifier"):
        audio, truth = song(seed, RATE)
        rows.append(features(reconstruct(vae, whole_frames(audio[: (2 + HEARD) * RATE]))))
        labels.append(LEADS.index(truth.lead))
    return Classifier(np.stack(rows), labels)


def same_tempo(audio: np.ndarray, bpm: int) -> bool:
    """Within 4 %, or an octave of it."""
    heard = estimate(soxr.resample(audio.T, RATE, tempo.RATE)).values.get("bpm")
    return heard is not None and any(abs(heard * factor / bpm - 1) <= 0.04 for factor in (0.5, 1, 2))


def request(truth: Truth, seed: int, options: argparse.Namespace) -> generation.Request:
    return generation.Request(
        prompt=truth.caption,
        duration=int(truth.duration),
        bpm=truth.bpm,
        keyscale=truth.keyscale,
        timesignature=truth.timesignature.partition("/")[0],
        instrumental=True,
        steps=options.steps,
        shift=options.shift,
        guidance_scale=options.guidance,
        seeds=[seed],
    )


def agreement(classify: Classifier, clips: list[np.ndarray], truths: list[Truth]) -> dict[str, float]:
    """Shares of clips that follow their truth, and of clips that follow another clip's: chance."""
    heard = classify(np.stack([features(clip) for clip in clips]))
    others = truths[1:] + truths[:1]
    return {
        "instrument": float(np.mean([LEADS[h] == t.lead for h, t in zip(heard, truths, strict=True)])),
        "instrument_chance": float(np.mean([LEADS[h] == t.lead for h, t in zip(heard, others, strict=True)])),
        "tempo": float(np.mean([same_tempo(clip, t.bpm) for clip, t in zip(clips, truths, strict=True)])),
        "tempo_chance": float(np.mean([same_tempo(clip, t.bpm) for clip, t in zip(clips, others, strict=True)])),
    }


@torch.no_grad()
def flow_losses(pipeline, clips: list[np.ndarray], truths: list[Truth], options: argparse.Namespace) -> dict:
    """Means over clips and noise levels, drawn as in training: the same noise for each model and prompt."""
    torch.manual_seed(0)
    trained, untrained = pipeline.transformer, AceStepTransformer1DModel.from_config(pipeline.transformer.config)
    null = pipeline.condition_encoder.null_condition_emb.view(1, 1, -1)
    asked = [request(truth, 1, options) for truth in truths]
    states = [generation.condition(pipeline, one.duration, one.words) for one in asked]
    t = LogitNormal()((torch.arange(LEVELS) + 0.5) / LEVELS)
    losses = []
    for number, clip in enumerate(tqdm(clips, desc="losses")):
        data = pipeline.vae.encode(torch.from_numpy(clip)[None]).latent_dist.mean.mT.expand(LEVELS, -1, -1)
        noise = torch.randn(data.shape)
        context = silence_context(pipeline.condition_encoder.silence_latent[0], data.shape[1]).expand(LEVELS, -1, -1)
        cases = {
            "nano": (trained, states[number]),
            "another song's prompt": (trained, states[number - 1]),
            "no prompt": (trained, null),
            "untrained": (untrained, states[number]),
        }
        x_t, target = flow.noisy(data, noise, t), flow.velocity(data, noise)
        lengths = torch.full((LEVELS,), data.shape[1])
        row = {}
        for name, (model, condition) in cases.items():
            v = model(x_t, t, t, condition.expand(LEVELS, -1, -1), context, return_dict=False)[0]
            row[name] = flow.item_losses(v, target, lengths).mean()
        losses.append(row)
    return {name: float(np.mean([row[name] for row in losses])) for name in losses[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--learn", type=int, default=300, help="songs the classifier is trained on")
    parser.add_argument("--steps", type=int, default=NANO.steps)
    parser.add_argument("--shift", type=float, default=NANO.shift)
    parser.add_argument("--guidance", type=float, default=NANO.guidance_scale)
    options = parser.parse_args()
    base = basemodel.find(str(options.model), variant="nano", repo="acestep-lora")
    pipeline = generation.load_pipeline(base, torch.float32, "cpu")
    pipeline.set_progress_bar_config(disable=True)
    classify = learn_instruments(pipeline.vae, options.learn)
    originals, real, made, truths = [], [], [], []
    for seed in tqdm(range(UNSEEN, UNSEEN + options.clips), desc="clips"):
        audio, truth = song(seed, RATE)
        truths.append(truth)
        originals.append(whole_frames(audio))
        real.append(reconstruct(pipeline.vae, originals[-1]))
        made.append(generation.generate(pipeline, request(truth, 1, options))[0].numpy())
    result = {
        "loss": flow_losses(pipeline, originals, truths, options),
        "real": agreement(classify, real, truths),
        "generated": agreement(classify, made, truths),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
