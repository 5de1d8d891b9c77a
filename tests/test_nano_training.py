"""The scripts that train nano: the VAE's latents are brought to scale, pieces resume, prompts become conditions."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "data"))
import train_nano_dit  # noqa: E402
import train_nano_vae  # noqa: E402
from procedural import song  # noqa: E402

from acestep_lora import basemodel  # noqa: E402
from acestep_lora.conditioning import TEXT2MUSIC, Conditioning  # noqa: E402
from acestep_lora.data.passes import TextPass  # noqa: E402
from acestep_lora.data.track import Track  # noqa: E402

NANO = ROOT / "data" / "models" / "nano"
RATE = train_nano_vae.RATE


def options(folder: Path, **changed) -> train_nano_vae.Options:
    usual = {"minutes": 1e-3, "out": folder, "init": None, "lr": 1e-3, "batch": 1, "crop": 0.32, "seed": 0, "clips": 1}
    return train_nano_vae.Options(**(usual | changed))


@pytest.fixture(scope="module")
def vae():
    return train_nano_vae.new_vae(0)


@torch.no_grad()
def test_folding_the_scale_changes_latents_and_nothing_else(vae):
    vae = train_nano_vae.copied(vae)
    audio = torch.from_numpy(np.stack([song(seed)[0][: 2 * RATE].T for seed in (1, 2)]))
    before, heard = vae.encode(audio).latent_dist, vae.decode(vae.encode(audio).latent_dist.mean).sample
    train_nano_vae.fold_scale(vae, audio)
    after = vae.encode(audio).latent_dist
    torch.testing.assert_close(after.mean.mean((0, 2)), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(after.mean.std((0, 2)), torch.ones(16), atol=1e-3, rtol=0)
    scale = before.mean.std((0, 2))[None, :, None]
    torch.testing.assert_close(after.std * scale, before.std, rtol=0.05, atol=1e-3)
    again, middle = vae.decode(after.mean).sample, slice(RATE // 2, -RATE // 2)  # padding is heard at the ends
    torch.testing.assert_close(again[..., middle], heard[..., middle], atol=2e-3 * float(heard.std()), rtol=0)


def test_the_loss_is_that_of_what_is_heard(vae):
    audio = torch.from_numpy(np.ascontiguousarray(song(3)[0][None, : 15 * 640].transpose(0, 2, 1)))
    parts = train_nano_vae.losses(vae, audio, warmth=0.0)
    assert parts["kl"] == 0 and all(torch.isfinite(part) for part in parts.values())
    silent = SimpleNamespace(
        encode=vae.encode, decode=lambda z: SimpleNamespace(sample=torch.zeros_like(audio) + 0 * z.sum())
    )
    parts = train_nano_vae.losses(silent, audio, warmth=1.0)
    # Silence is off by all there is, but for the floor.
    assert float(parts["magnitude"].detach()) == pytest.approx(1, abs=0.1)
    assert parts["kl"] > 0


def test_pieces_resume_and_learn(tmp_path, monkeypatch):
    monkeypatch.setattr(train_nano_vae, "POOL", 2)
    training = train_nano_vae.Training(options(tmp_path))
    rows = [training.advance() for _ in range(3)]
    assert rows[0].keys() == {"magnitude", "phase", "log", "kl", "norm"} and training.step == 3
    training.save()
    again = train_nano_vae.Training(options(tmp_path))
    assert again.step == 3 and again.spent == training.spent
    for name, value in training.average.state_dict().items():
        assert torch.equal(value, again.average.state_dict()[name]), name
    stored = train_nano_vae.Training(options(tmp_path / "next", init=tmp_path / "vae"))
    assert stored.step == 0 and stored.warmth() == 1
    torch.testing.assert_close(
        stored.vae.state_dict()["decoder.conv2.weight_v"],
        training.average.state_dict()["decoder.conv2.weight_v"],
        rtol=2**-7,
        atol=0,
    )


def test_conditions_are_those_of_preprocessing(monkeypatch):
    base = basemodel.find(str(NANO), variant="nano", repo="")
    texts = TextPass.load(
        SimpleNamespace(base=base, conditioning=Conditioning(), dtype=torch.float32, timbre_token=None), []
    )
    module = train_nano_dit.JointModule.__new__(train_nano_dit.JointModule)
    torch.nn.Module.__init__(module)
    module.base, module.tokenizer = base, texts.tokenizer
    module.text_encoder, module.condition_encoder = texts.text_encoder, texts.condition_encoder
    captions = ("a calm waltz", "driving rock, trumpet lead, organ chords, no drums")
    module.tracks = {name: Track(id=name, path=Path(name), caption=name, bpm=90, duration=9.5) for name in captions}
    trainer = SimpleNamespace(datamodule=SimpleNamespace(conditioning=Conditioning()))
    monkeypatch.setattr(train_nano_dit.JointModule, "trainer", trainer)
    tracks = list(module.tracks.values())
    prompts = [Conditioning().prompt(track, track.caption, TEXT2MUSIC, track.duration) for track in tracks]
    with torch.no_grad():
        states, mask = module.conditions(prompts)
        for i, track in enumerate(tracks):
            expected = texts._condition(prompts[i], Conditioning().lyrics(track))
            torch.testing.assert_close(states[i][mask[i]], expected, atol=1e-5, rtol=0)


def test_songs_are_written_once_with_what_is_known(tmp_path):
    train_nano_dit.write_songs(tmp_path, RATE, first=7, count=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0000007.flac", "0000007.json", "0000008.flac", "0000008.json"
    ]  # fmt: skip
    before = (tmp_path / "0000007.flac").stat().st_mtime_ns
    train_nano_dit.write_songs(tmp_path, RATE, first=7, count=2)
    assert (tmp_path / "0000007.flac").stat().st_mtime_ns == before
