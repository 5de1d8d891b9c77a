"""Train nano's transformer and both of its text encoders on the procedural source.

    python data/train_nano_dit.py --model FOLDER --songs FOLDER --count 2000 --minutes 90 [key=value ...]

This is `python train.py adapter=none` on songs of the source, with one difference: the conditions are computed in every
step, so that the encoders that make them learn too. It starts from the weights in --model, which must hold a trained
VAE, with a fresh optimizer, and ends by writing better ones there. Further arguments are train.py's.
"""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import soundfile
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW, Muon, Optimizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from procedural import song  # noqa: E402
from train_nano_vae import RATE  # noqa: E402

from acestep_lora import basemodel, cli  # noqa: E402
from acestep_lora.conditioning import TEXT2MUSIC  # noqa: E402
from acestep_lora.data.fields import INSTRUMENTAL  # noqa: E402
from acestep_lora.data.items import Batch  # noqa: E402
from acestep_lora.module import FlowModule  # noqa: E402
from acestep_lora.randomness import generator  # noqa: E402

WIDEST = 512  # of a matrix that is no embedding
GENRE, UNKNOWN = 0.2, 0.1  # how often a prompt is the genre alone, and how often its BPM, key and metre are not given
# What a song's tempo is, and where its beats are, is decided in the first steps of sampling, near pure noise.
NOISE = ("LogitNormal", "Uniform,low:0.85", "Uniform,low:0.96")
COMPONENTS = ",".join(f"{{_target_:acestep_lora.timesteps.{levels}}}" for levels in NOISE)
OVERRIDES = f"""
    adapter=none model=nano optimizer._target_=train_nano_dit.MuonAdamW ~optimizer.eps ~optimizer.fused
    optimizer.lr=3e-3 optimizer.betas=[0.9,0.98] ema.decay=0.999
    timesteps=mixture timesteps.components=[{COMPONENTS}] timesteps.weights=[0.4,0.3,0.3]
    dataset=folder dataset.batch_size=16 dataset.val_fraction=0.02 dataset.stratify=true dataset.condition_dropout=0.1
    trainer.accumulate_grad_batches=1 trainer.max_epochs=1000 trainer.check_val_every_n_epoch=2
    save_every_n_steps=500 keep_last=1 keep_best=0 sample=false training_report=false resume=auto logger=csv
    module._target_=train_nano_dit.JointModule module.grad_norms_every_n_steps=0
""".split()


# ---------------------------------------------------------------- songs


def write_songs(folder: Path, rate: int, first: int, count: int) -> None:
    """FLAC files with JSON sidecars, those that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + count):
        path = folder / f"{seed:07d}.flac"
        if path.is_file():
            continue
        audio, truth = song(seed, rate)
        known = ("caption", "genre", "bpm", "keyscale", "timesignature")
        sidecar = {name: getattr(truth, name) for name in known} | {"lyrics": INSTRUMENTAL}
        path.with_suffix(".json").write_text(json.dumps(sidecar), encoding="utf-8")
        soundfile.write(path, audio, rate, subtype="PCM_16")


# ---------------------------------------------------------------- training


class JointModule(FlowModule):
    """The training step, with conditions made by encoders that are trained in it instead of cached ones."""

    def configure_model(self) -> None:
        if self.dit is not None:
            return
        super().configure_model()
        self.text_encoder, self.tokenizer = basemodel.load_text_encoder(self.base, torch.float32, "cpu")
        self.condition_encoder = basemodel.load_condition_encoder(self.base, torch.float32, "cpu")
        self.text_encoder.requires_grad_(True).train()
        self.condition_encoder.requires_grad_(True).train()
        self.condition_encoder.null_condition_emb.requires_grad_(False)  # the transformer learns what it means
        self.tracks = {song.track.id: song.track for song in self.trainer.datamodule.songs}

    def losses(self, batch: Batch) -> Tensor:
        texts = [self.prompt(name, batch.key + i) for i, name in enumerate(batch.tracks)]
        condition, mask = self.conditions(texts)
        return super().losses(replace(batch, condition=condition, condition_mask=mask))

    def prompt(self, name: str, key: int) -> str:
        """What a song is called this time; in validation always its caption with everything known."""
        track, conditioning = self.tracks[name], self.trainer.datamodule.conditioning
        genre, unknown = torch.rand(2, generator=generator(self.seed, "prompt", key)).tolist()
        if self.training and unknown < UNKNOWN:
            track = replace(track, bpm=None, keyscale="", timesignature="")
        caption = track.genre if self.training and genre < GENRE else track.caption
        return conditioning.prompt(track, caption, TEXT2MUSIC, track.duration)

    def conditions(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Condition states [b, l, d] of instrumental songs and which of them are real [b, l].

        The packing of AceStepConditionEncoder.forward, with lyrics and timbre, the same for all, encoded once.
        """
        encoder, conditioning = self.condition_encoder, self.trainer.datamodule.conditioning
        instrumental = conditioning.lyrics(next(iter(self.tracks.values())))
        lyrics = self.text_encoder.get_input_embeddings()(self._tokens(instrumental)[None])
        lyric = encoder.lyric_encoder(inputs_embeds=lyrics, attention_mask=torch.ones(lyrics.shape[:2]))
        silence = encoder.silence_latent[:, : math.ceil(30 * self.base.frame_rate)]
        timbre, _ = encoder.timbre_encoder(silence, torch.zeros(1, dtype=torch.long))
        tokens = [self._tokens(prompt) for prompt in prompts]
        mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in tokens], batch_first=True)
        padded = pad_sequence(tokens, batch_first=True)
        text = encoder.text_projector(self.text_encoder(padded, attention_mask=mask.long()).last_hidden_state)
        head = torch.cat([lyric, timbre], dim=1).expand(len(prompts), -1, -1)
        real = torch.ones(head.shape[:2], dtype=torch.bool)
        return torch.cat([head, text], dim=1), torch.cat([real, mask], dim=1)

    def _tokens(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text).input_ids)


class MuonAdamW(Optimizer):
    """Muon (Jordan 2024) for the matrices inside, AdamW for embeddings, convolutions, tables and norms; one rate.

    Nano's validation loss gets in 391 steps where AdamW alone needs 783.
    """

    def __init__(self, params: list[Tensor], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        matrices = [p for p in params if p.ndim == 2 and max(p.shape) <= WIDEST]
        others = [p for p in params if p.ndim != 2 or max(p.shape) > WIDEST]
        common = {"lr": lr, "weight_decay": weight_decay}
        self.parts = [AdamW(others, betas=tuple(betas), fused=True, **common)]
        if matrices:
            self.parts.append(Muon(matrices, adjust_lr_fn="match_rms_adamw", **common))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Each part steps its own group of this optimizer, with this optimizer's state."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure and closure()
        for part in self.parts:
            part.step()
        return loss


# ---------------------------------------------------------------- weights


def averaged(checkpoint: Path) -> dict[str, Tensor]:
    """The moving average of everything that was trained."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return next(state["average"] for state in saved["callbacks"].values() if "average" in state)


def publish(checkpoint: Path, model: Path) -> None:
    """Put what a run learnt into the model's folder."""
    from diffusers import AceStepPipeline
    from make_nano import DTYPE, save

    pipeline = AceStepPipeline.from_pretrained(model)
    weights = averaged(checkpoint)
    parts = {"dit": "transformer", "text_encoder": "text_encoder", "condition_encoder": "condition_encoder"}
    for prefix, name in parts.items():
        part = getattr(pipeline, name)
        own = {key.removeprefix(f"{prefix}."): value for key, value in weights.items() if key.startswith(f"{prefix}.")}
        unknown = part.load_state_dict(own, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"{checkpoint} does not fit {model / name}: {unknown[0]} has no counterpart.")
        save(part if name == "text_encoder" else part.to(DTYPE), model / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--songs", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="where checkpoints go; beside the songs if not given")
    parser.add_argument("--first", type=int, default=0, help="seed of the first song")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--minutes", type=float, required=True)
    options, overrides = parser.parse_known_args()
    from hydra import compose, initialize_config_dir

    from acestep_lora.callbacks.checkpoints import checkpoint_folders
    from train import train

    write_songs(options.songs, RATE, options.first, options.count)
    run = options.run or options.songs / "run"
    cli.register()
    hours, minutes = divmod(math.ceil(options.minutes), 60)
    paths = [f"model.path='{options.model.resolve()}'", f"dataset.dir='{options.songs.resolve()}'"]
    with initialize_config_dir(str(cli.CONF), version_base=None):
        cfg = compose("train", [*OVERRIDES, *paths, f"trainer.max_time=00:{hours:02d}:{minutes:02d}:00", *overrides])
    print(train(cfg, run.resolve()).message)
    publish(checkpoint_folders(run)[-1] / "state.ckpt", options.model)


if __name__ == "__main__":
    main()
