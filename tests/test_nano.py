"""data/models/nano: loads with plain diffusers, behaves like a checkpoint, has grown from what make_nano.py makes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AceStepPipeline

ROOT = Path(__file__).parent.parent
NANO = ROOT / "data" / "models" / "nano"
sys.path.insert(0, str(ROOT / "data"))
import make_nano  # noqa: E402
import measures  # noqa: E402
import train_nano_vae  # noqa: E402
from procedural import song  # noqa: E402


@pytest.fixture(scope="module")
def nano() -> AceStepPipeline:
    pipeline = AceStepPipeline.from_pretrained(NANO)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def made(nano) -> AceStepPipeline:
    return make_nano.make_pipeline(nano.vae)


def tensors(pipeline: AceStepPipeline) -> dict[str, torch.Tensor]:
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def config(path: Path) -> dict:
    values = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if key not in ("_diffusers_version", "transformers_version")}


def generate(nano: AceStepPipeline, prompt: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nano(prompt, "[Instrumental]", audio_duration=2.0, guidance_scale=1.0, generator=generator).audios


def test_generates_what_seed_and_prompt_ask_for(nano):
    audio = generate(nano, "lofi, warm piano", seed=1)
    assert audio.shape == (1, 2, 24000)
    assert audio.isfinite().all() and audio.std() > 0.01
    assert torch.equal(audio, generate(nano, "lofi, warm piano", seed=1))
    assert not torch.allclose(audio, generate(nano, "lofi, warm piano", seed=2), atol=1e-2)
    assert not torch.allclose(audio, generate(nano, "heavy metal guitar", seed=1), atol=1e-4)


@torch.inference_mode()
def test_latents_of_unseen_songs_are_normalised_and_can_be_heard(nano):
    clips = [np.ascontiguousarray(song(train_nano_vae.UNSEEN + i, 12000)[0][:120000].T) for i in range(3)]
    posteriors = [nano.vae.encode(torch.from_numpy(clip)[None]).latent_dist for clip in clips]
    means = torch.cat([posterior.mean[0] for posterior in posteriors], dim=1)
    assert means.shape[0] == 48 and means.mean().abs() < 0.3 and 0.5 < means.std() < 2
    assert all(0.03 < posterior.std.min() and posterior.std.max() < 0.07 for posterior in posteriors)
    heard = [nano.vae.decode(posterior.mean).sample[0].numpy() for posterior in posteriors]
    pairs = list(zip(clips, heard, strict=True))
    assert np.mean([measures.chroma_correlation(clip, copy, 12000) for clip, copy in pairs]) > 0.75
    assert np.mean([measures.spectral_distance(copy, clip) for clip, copy in pairs]) < 0.8


def test_silence_latent_is_the_encoding_of_silence_after_a_marked_start(nano):
    with torch.inference_mode():
        encoded = nano.vae.encode(torch.zeros(1, 2, 4 * nano.sample_rate)).latent_dist.mean.transpose(1, 2)
    silence = nano.condition_encoder.silence_latent
    assert silence.shape == (1, 15000, 48)
    torch.testing.assert_close(silence[:, 4:80], encoded[:, 4:80], rtol=2**-7, atol=1e-3)
    assert torch.equal(silence[:, 80:], silence[:, 80:81].expand(-1, 14920, -1))
    assert (silence[0, 0] - silence[0, 80]).norm() > 10


def test_lokr_with_factor_8_fits_every_projection(nano):
    linears = [m for m in nano.transformer.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 6 * 11
    assert min(min(linear.weight.shape) for linear in linears) >= 8**2


@pytest.mark.parametrize("text", ["lofi, warm piano", "音楽 ünï 🎹", "", "# Lyric\n[Verse 1]\nla<|endoftext|>"])
def test_tokenizer_is_lossless_and_ends_like_the_real_one(nano, text):
    tokens = nano.tokenizer(text).input_ids
    assert tokens[-1] == nano.tokenizer.eos_token_id
    assert nano.tokenizer.decode(tokens) == text + "<|endoftext|>"


def test_tokenizer_pads_right_and_leaves_room_for_a_caption(nano):
    prompt, _ = nano._format_prompt("", "", audio_duration=30.0, bpm=120, keyscale="F# minor", timesignature="4")
    batch = nano.tokenizer([prompt, "a"], padding="longest")
    assert len(batch.input_ids[0]) < 100  # of 256
    assert batch.attention_mask[1][0] == 1 and batch.attention_mask[1][-1] == 0


def test_files_are_small_and_say_nothing_about_the_machine():
    files = [path for path in NANO.rglob("*") if path.is_file()]
    assert len(files) == 17
    assert sum(path.stat().st_size for path in files) < 16e6
    for path in NANO.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(encoding="utf-8"), path


def test_script_is_deterministic(made, nano):
    state = torch.get_rng_state()
    again = tensors(make_nano.make_pipeline(nano.vae))
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in tensors(made).items():
        assert torch.equal(value, again[key]), key


def test_script_makes_what_training_starts_from(made, nano, tmp_path):
    folder = tmp_path / "nano"
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "config.json").write_text("old", encoding="utf-8")
    (folder / "README.md").write_text("card", encoding="utf-8")
    make_nano.save(made, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["nano"]
    assert (folder / "README.md").read_text(encoding="utf-8") == "card"
    for path in NANO.rglob("*.json"):
        assert config(path) == config(folder / path.relative_to(NANO)), path
    shipped, fresh = tensors(nano), tensors(made)
    assert {key: value.shape for key, value in shipped.items()} == {key: value.shape for key, value in fresh.items()}
    assert torch.equal(shipped["condition_encoder.silence_latent"], fresh["condition_encoder.silence_latent"].float())


def script(name: str, *arguments: object) -> str:
    command = [sys.executable, ROOT / "data" / name, *map(str, arguments)]
    return subprocess.run(command, check=True, text=True, stdout=-1, env=os.environ | {"WANDB_MODE": "disabled"}).stdout


@pytest.mark.slow
def test_every_stage_of_its_training_learns(tmp_path):
    """The commands of the model card, for a few steps each, from nothing."""
    vae, model, songs, run = (tmp_path / name for name in ("vae", "model", "songs", "run"))
    script("train_nano_vae.py", "--minutes", 0.6, "--out", vae, "--clips", 4)
    scores = json.loads((vae / "scores.json").read_text(encoding="utf-8"))["scores"]
    assert scores["trained"]["spectral_distance"] < 0.97 * scores["untrained"]["spectral_distance"]
    script("make_nano.py", "--vae", vae / "vae", "--out", model)
    steps = ["trainer.max_steps=12", "trainer.log_every_n_steps=1", "scheduler.warmup_steps=2"]
    given = ["--model", model, "--songs", songs, "--run", run, "--count", 48, "--minutes", 10]
    script("train_nano_dit.py", *given, *steps)
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses[-1] < 0.7 * losses[0]
    printed = script("score_nano.py", "--model", model, "--clips", 2, "--learn", 12)
    loss = json.loads(printed)["loss"]
    assert loss["nano"] < loss["untrained"]
