"""The whole road, songs to audio, on models in upstream's layout: nothing assumes nano's rates, widths or folders."""

import shutil

import builders
import pytest
import soundfile
import torch
from diffusers import AutoencoderOobleck


@pytest.fixture(scope="module")
def golden_model(tmp_path_factory, golden_variant):
    """The golden checkpoint with a VAE of the released rate and width, and a text encoder of its text width."""
    folder = tmp_path_factory.mktemp("golden")
    shutil.copytree(golden_variant, folder / golden_variant.name)
    torch.manual_seed(0)
    AutoencoderOobleck(
        sampling_rate=48000,
        downsampling_ratios=[10, 12, 16],
        channel_multiples=[1, 1, 1],
        encoder_hidden_size=128,
        decoder_input_channels=64,
        decoder_channels=8,
    ).save_pretrained(folder / "vae")
    builders.text_encoder(32).save_pretrained(folder / "Qwen3-Embedding-0.6B")
    shutil.copytree(builders.NANO / "tokenizer", folder / "Qwen3-Embedding-0.6B", dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """24 kHz, 20 frames a second, 8 channels, a condition encoder narrower than the transformer."""
    return builders.base_model(tmp_path_factory.mktemp("other"))


@pytest.mark.parametrize("model, rate, adapter", [
    ("golden_model", 48000, ("adapter=lora", "conditioning.lm_hints=0.5")),
    ("other_model", 24000, ("adapter=lokr", "adapter.factor=4", "dataset.batch_size=2", "dataset.crop_seconds=null")),
])  # fmt: skip
def test_songs_to_audio(model, rate, adapter, run, tmp_path, request, configure):
    import generate

    path = request.getfixturevalue(model)
    builders.write_songs(tmp_path / "songs", 22050, count=2, seconds=0.6)
    result, folder = run(
        f"dataset.dir={tmp_path / 'songs'}", f"dataset.cache_dir={tmp_path / 'cache'}", "dataset.crop_seconds=0.5",
        "model=turbo", f"model.path={path}", "trainer.max_steps=2", "trainer.accumulate_grad_batches=2", *adapter,
    )  # fmt: skip
    assert result.metric > 0 and result.left_out == 0
    chosen = ("model=turbo", f"model.path={path}", f"adapter.path={folder}", "duration=1", "steps=2", "compare=true")
    files = generate.generate(configure("generate", *chosen, "prompt=a drum", f"output_dir={tmp_path / 'out'}"))
    adapted, base = (soundfile.read(file) for file in files if file.suffix == ".wav")
    assert adapted[1] == base[1] == rate and len(adapted[0]) == pytest.approx(rate, abs=rate // 10)
    assert (adapted[0] != base[0]).any()
