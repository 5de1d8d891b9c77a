"""Previews: the live adapter as generate.py would play its file, in a grid, at a bounded cost, harmless to training."""

import logging
import re

import numpy as np
import pytest
import soundfile
import torch
from test_report import Page

from acestep_lora import generation
from acestep_lora.callbacks import previews
from acestep_lora.data.track import scan
from acestep_lora.dit import AceStepDiT, load_dit
from acestep_lora.errors import UserError
from acestep_lora.generation import Request

QUICK = ["trainer.max_steps=4", "optimizer.lr=1e-2", "scheduler=constant", "save_every_n_epochs=1"]
HEAR = ["previews.every_n_epochs=1", "previews.duration=1", "previews.seeds=[1,2]", "previews.share=1"]


@pytest.fixture(scope="module")
def finished(run):
    return run(
        *QUICK, *HEAR, "previews.prompts=[lofi piano,{prompt: '<b>',lyrics: '[Verse]\\na',bpm: 90}]", "ema.decay=0.5"
    )[1]


def names(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_every_prompt_and_seed_is_there_beside_the_base_model(finished):
    clips = [f"{prompt}-seed_{seed}" for prompt in (1, 2) for seed in (1, 2)]
    written = {f"previews/base model/{clip}.wav" for clip in clips}
    written |= {f"previews/epoch_{e:04d}/{clip}.{kind}" for e in (0, 1) for clip in clips for kind in ("wav", "png")}
    assert names(finished / "samples") == written | {"index.html"}


def test_the_page_is_a_grid_of_players(finished):
    text = (finished / "samples/index.html").read_text(encoding="utf-8")
    page = Page(text)
    players = page.attributes("audio", "src")
    assert len(players) == 4 * 3 and len(page.attributes("img", "src")) == 12
    assert all((finished / "samples" / player.replace("%20", " ")).is_file() for player in players)
    assert re.search(r"base model\s*epoch_0000\s*epoch_0001", page.text) and "2. <b> (seed 1)" in page.text
    assert "a preview holds training up" in page.text and not {"script", "b"} & {tag for tag, _ in page.tags}


def test_a_preview_is_what_the_exported_adapter_plays(finished, nano):
    """Also under EMA: what is heard is what is saved."""
    request = Request("lofi piano", duration=1.0, steps=16, guidance_scale=4.0, seeds=[1, 2])
    pipeline = generation.load_pipeline(nano, torch.float32, "cpu")
    for column, path in (
        ("base model", None),
        ("epoch_0000", "checkpoints/epoch_0000-step_000002/adapter"),
        ("epoch_0001", "adapter"),
    ):
        if path:
            pipeline = generation.load_pipeline(nano, torch.float32, "cpu")
            generation.add_adapters(pipeline, [str(finished / path)], [1.0])
        for seed, clip in zip(request.seeds, generation.generate(pipeline, request), strict=True):
            heard = soundfile.read(finished / f"samples/previews/{column}/1-seed_{seed}.wav")[0]
            np.testing.assert_allclose(heard.T, clip.numpy(), atol=2e-3)


def test_previews_leave_no_trace_in_the_training(finished, run):
    other = run(*QUICK, "ema.decay=0.5")[1]
    files = [folder / "adapter/adapter_model.safetensors" for folder in (finished, other)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_without_prompts_the_held_out_songs_words_are_used(run):
    folder = run("trainer.max_steps=2", "previews.every_n_epochs=1", "previews.duration=1")[1]
    [line] = re.findall(
        r"1\. (.*?) \(seed 42\)", Page((folder / "samples/index.html").read_text(encoding="utf-8")).text
    )
    assert line in {track.caption for track in scan("data/demo").tracks} | {"night-walk music-box"}


def test_the_pipeline_is_where_its_transformer_is(nano):
    """The VAE waits on the CPU; what is generated must not."""
    make = generation.remember(nano, [Request("a", duration=1.0)], torch.float32, "cpu", None)
    with torch.device("meta"):
        dit = AceStepDiT(**{name: value for name, value in load_dit(nano.dit).config.items() if name[0] != "_"})
    pipeline = make(generation.Sampled(dit))
    assert pipeline.device.type == pipeline._execution_device.type == "meta" and pipeline.vae.device.type == "cpu"


def test_wandb_gets_clips_and_spectrograms(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = run("trainer.max_steps=2", *HEAR, "previews.seeds=[1]", "logger=wandb")[1]
    media = {path.suffix for path in folder.rglob("wandb/*/files/media/*/previews/*")}
    assert media == {".wav", ".png"}


@pytest.mark.parametrize("lacking, made", [("free", 0), ("spare", 2)])
def test_memory_decides(run, monkeypatch, caplog, lacking, made):
    """Too little for a preview: none, with the reason. Too little for a preview beside a step: one after the other."""
    monkeypatch.setattr(previews, f"{lacking}_memory", lambda device: 2**20)
    with caplog.at_level(logging.WARNING):
        folder = run(*QUICK, *HEAR)[1]
    assert len(list((folder / "samples/previews").glob("epoch_*"))) == made
    told = [record.getMessage() for record in caplog.records if "preview" in record.getMessage()]
    assert bool(told) == (made == 0) and all(
        re.search(r"they need 0\.\d+ GiB \(predicted\) and 0.00 are", t) for t in told
    )


def test_their_share_of_the_time_is_bounded(run):
    folder = run(*QUICK, *HEAR, "previews.share=1e-9")[1]
    assert [path.name for path in sorted((folder / "samples/previews").iterdir())] == ["base model", "epoch_0000"]
    assert "no preview, they have taken more than" in (folder / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "override, reason",
    [
        ("previews.share=0", "previews.share"),
        ("previews.prompts=5", "previews.prompts"),
        ("previews.prompts=[{prompt: a,tempo: 1}]", "previews.prompts.*tempo"),
    ],
)
def test_what_cannot_be_is_one_sentence(run, override, reason):
    with pytest.raises(UserError, match=reason):
        run(*QUICK, *HEAR, override)
