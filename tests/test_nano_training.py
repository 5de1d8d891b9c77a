"""The scripts that train nano: the VAE's latents are brought to scale, pieces resume, prompts become conditions."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderOobleck

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "data"))
import lapped  # noqa: E402
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
    return train_nano_vae.new_vae(0, songs=6)


@torch.no_grad()
def test_folding_the_scale_changes_latents_and_nothing_else(vae):
    vae = train_nano_vae.copied(vae)
    audio = torch.from_numpy(np.stack([song(seed, RATE)[0][: 2 * RATE].T for seed in (1, 2)]))
    heard = vae.decode(vae.encode(audio).latent_dist.mean).sample
    train_nano_vae.fold_scale(vae, audio)
    after = vae.encode(audio).latent_dist
    torch.testing.assert_close(after.mean.mean((0, 2)), torch.zeros(48), atol=1e-3, rtol=0)
    torch.testing.assert_close(after.mean.std((0, 2)), train_nano_vae.STDS, atol=2e-3, rtol=0)
    torch.testing.assert_close(after.std, torch.full_like(after.std, train_nano_vae.NOISE), atol=1e-3, rtol=0)
    again, middle = vae.decode(after.mean).sample, slice(RATE // 2, -RATE // 2)  # padding is heard at the ends
    torch.testing.assert_close(again[..., middle], heard[..., middle], atol=2e-3 * float(heard.std()), rtol=0)


@torch.no_grad()
def test_a_new_vae_is_the_lapped_transform(vae):
    """The low end of the middle channel is what goes in, and the first latents are the MDCT's coefficients."""
    vae, low = AutoencoderOobleck.from_config(vae.config), train_nano_vae.LOW
    lapped.initialise(vae, low, list(train_nano_vae.LOUDNESS))
    vae.encoder.block[-1].res_unit1.conv2.weight_g.zero_()  # no levels, no bursts
    for name, parameter in vae.named_parameters():  # without what is to be learnt
        if "res_unit" in name and name.endswith("conv2.weight_g"):
            parameter.zero_()
        elif name.endswith("snake1.beta"):
            parameter.fill_(20.0)
    t = torch.arange(4 * RATE) / RATE
    tones = sum(torch.sin(2 * torch.pi * f * t + f) for f in (82.4, 220.0, 330.0)) / 30
    audio = tones.expand(1, 2, -1)
    latents = vae.encode(audio).latent_dist.mean
    frame = tones[480 * 50 - 240 : 480 * 50 + 720] @ lapped.basis(480, low)
    torch.testing.assert_close(latents[0, :low, 50] / lapped.GAIN, frame, atol=2e-3, rtol=0)
    error = (vae.decode(latents).sample - audio)[..., RATE:-RATE]
    assert error.std() < 0.02 * tones.std()


@torch.no_grad()
def test_a_level_rises_with_loudness_and_most_in_its_own_band(vae):
    low, bands = train_nano_vae.LOW, len(train_nano_vae.LOUDNESS)
    limits = lapped.edges(RATE, train_nano_vae.HOP, low, bands)
    t = torch.arange(RATE) / RATE
    for band in range(bands):
        tone = torch.sin(2 * torch.pi * float(limits[band] * limits[band + 1]) ** 0.5 * t)
        clips = torch.stack([loudness * tone.expand(2, -1) for loudness in (0.0, 0.005, 0.02, 0.05)])
        levels = vae.encode(clips).latent_dist.mean[:, low : low + bands, 5:-5].mean(-1)
        rises = (levels - levels[0]).T
        assert (rises[band].diff() > 0.2).all(), "louder is more"
        assert rises[:, 2].argmax() == band, "and most in its own band"


def test_the_loss_is_that_of_what_is_heard(vae):
    audio = torch.from_numpy(np.ascontiguousarray(song(3, RATE)[0][None, : 15 * 480].transpose(0, 2, 1)))
    assert all(torch.isfinite(part) for part in train_nano_vae.losses(vae, audio).values())
    silent = SimpleNamespace(
        encode=vae.encode, decode=lambda z: SimpleNamespace(sample=torch.zeros_like(audio) + 0 * z.sum())
    )
    parts = train_nano_vae.losses(silent, audio)
    # Silence is off by all there is, but for the floor.
    assert float(parts["root"].detach()) == pytest.approx(train_nano_vae.WEIGHTS["root"], rel=0.1)


def test_pieces_resume_and_learn(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(train_nano_vae, "POOL", 2)
    monkeypatch.setattr(train_nano_vae, "new_vae", lambda _: train_nano_vae.copied(vae))  # made once, it takes its time
    training = train_nano_vae.Training(options(tmp_path))
    rows = [training.advance() for _ in range(3)]
    assert rows[0].keys() == {*train_nano_vae.WEIGHTS, "norm"} and training.step == 3
    training.save()
    again = train_nano_vae.Training(options(tmp_path))
    assert again.step == 3 and again.spent == training.spent
    for name, value in training.average.state_dict().items():
        assert torch.equal(value, again.average.state_dict()[name]), name
    stored = train_nano_vae.Training(options(tmp_path / "next", init=tmp_path / "vae"))
    assert stored.step == 0
    torch.testing.assert_close(
        stored.vae.state_dict()["decoder.conv2.weight_v"],
        training.average.state_dict()["decoder.conv2.weight_v"],
        rtol=2**-7,
        atol=0,
    )


def test_the_optimizer_goes_on_from_its_state():
    """Matrices by Muon, the rest by AdamW, both at the rate a scheduler sets; resumed, the same bit for bit."""

    def step(weights, optimizer, number):
        optimizer.zero_grad()
        sum(((number + 1) * weight.sin()).sum() for weight in weights).backward()
        optimizer.step()

    def start(values):
        weights = [torch.nn.Parameter(value.clone()) for value in values]
        return weights, train_nano_dit.MuonAdamW(weights, lr=0.01, betas=(0.9, 0.98), weight_decay=0.01)

    torch.manual_seed(0)
    first = [torch.randn(8, 4), torch.randn(5), torch.randn(600, 4), torch.randn(2, 3, 4)]
    weights, optimizer = start(first)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.005]
    assert [[p.shape for p in group["params"]] for group in optimizer.param_groups][1] == [(8, 4)]
    for number in range(3):
        step(weights, optimizer, number)
    again, other = start([weight.detach() for weight in weights])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in ((weights, optimizer), (again, other)):
        for number in range(3, 6):
            step(*pair, number)
    for one, two, before in zip(weights, again, first, strict=True):
        assert torch.equal(one, two) and not torch.equal(one, before)


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
