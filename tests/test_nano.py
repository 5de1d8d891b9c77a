"""data/models/nano: loads with plain diffusers, behaves like a checkpoint, and is what data/make_nano.py makes."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from diffusers import AceStepPipeline

ROOT = Path(__file__).parent.parent
NANO = ROOT / "data" / "models" / "nano"


@pytest.fixture(scope="module")
def nano() -> AceStepPipeline:
    pipeline = AceStepPipeline.from_pretrained(NANO)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def make_nano():
    spec = importlib.util.spec_from_file_location("make_nano", ROOT / "data" / "make_nano.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(make_nano) -> AceStepPipeline:
    return make_nano.make_pipeline()


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
    assert audio.shape == (1, 2, 32000)
    assert audio.isfinite().all() and audio.std() > 0.01
    assert torch.equal(audio, generate(nano, "lofi, warm piano", seed=1))
    assert not torch.allclose(audio, generate(nano, "lofi, warm piano", seed=2), atol=1e-2)
    assert not torch.allclose(audio, generate(nano, "heavy metal guitar", seed=1), atol=1e-4)


def test_latents_have_the_scale_of_a_trained_vae(nano, make_nano):
    torch.manual_seed(1)
    audio = make_nano.pink_noise(5 * nano.sample_rate)
    with torch.inference_mode():
        posterior = nano.vae.encode(audio).latent_dist
        decoded = nano.vae.decode(posterior.mean).sample
    assert posterior.mean.shape == (1, 16, 125) and decoded.shape == audio.shape
    assert posterior.mean.mean().abs() < 0.3
    assert 0.5 < posterior.mean.std() < 2 and posterior.mean.std(-1).min() > 0.3
    assert posterior.std.max() < 0.1
    assert 0.01 < decoded.std() < 1


def test_silence_latent_is_the_encoding_of_silence(nano):
    with torch.inference_mode():
        encoded = nano.vae.encode(torch.zeros(1, 2, 4 * nano.sample_rate)).latent_dist.mean.transpose(1, 2)
    silence = nano.condition_encoder.silence_latent
    assert silence.shape == (1, 15000, 16)
    torch.testing.assert_close(silence[:, :80], encoded[:, :80], rtol=2**-7, atol=1e-3)
    assert torch.equal(silence[:, 80:], silence[:, 80:81].expand(-1, 14920, -1))
    assert silence.std() > 0.1


def test_velocity_has_a_std_of_about_one(nano):
    torch.manual_seed(0)
    t = torch.tensor([0.1, 0.9])
    inputs = torch.randn(2, 50, 16), t, t, torch.randn(2, 40, 64), torch.randn(2, 50, 32)
    with torch.inference_mode():
        assert 0.5 < nano.transformer(*inputs).sample.std() < 2


def test_lokr_with_factor_8_fits_every_projection(nano):
    linears = [m for m in nano.transformer.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 4 * 11
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
    assert sum(path.stat().st_size for path in files) < 8e6
    for path in NANO.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(encoding="utf-8"), path


def test_script_is_deterministic(made, make_nano):
    state = torch.get_rng_state()
    again = tensors(make_nano.make_pipeline())
    assert torch.equal(torch.get_rng_state(), state)
    assert again.keys() == tensors(made).keys()
    for key, value in tensors(made).items():
        assert torch.equal(value, again[key]), key


def test_script_makes_the_files(made, nano, make_nano, tmp_path):
    folder = tmp_path / "nano"
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "config.json").write_text("old", encoding="utf-8")
    (folder / "README.md").write_text("card", encoding="utf-8")
    make_nano.save(made, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["nano"]
    assert (folder / "README.md").read_text(encoding="utf-8") == "card"
    for path in NANO.rglob("*.json"):
        assert config(path) == config(folder / path.relative_to(NANO)), path
    shipped = tensors(nano)
    for key, value in tensors(AceStepPipeline.from_pretrained(folder)).items():
        # Another machine's rounding may move a bfloat16 by its last bit.
        torch.testing.assert_close(shipped[key], value, rtol=2**-6, atol=1e-2, msg=key)
