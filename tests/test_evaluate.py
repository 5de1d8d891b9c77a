"""Evaluation: the same loss as in training, distances and adherence of real clips, several adapters side by side."""

import csv
import json
import shutil
import sys
from functools import partial

import numpy as np
import peft
import pytest
import soundfile
import torch
from test_report import Page
from transformers import ClapAudioConfig, ClapConfig, ClapFeatureExtractor, ClapModel, ClapTextConfig

from acestep_lora import evaluate, generation, runs
from acestep_lora.adapters import Adapter
from acestep_lora.cli import ROOT
from acestep_lora.conditioning import Conditioning
from acestep_lora.data.audio import spool
from acestep_lora.data.datamodule import LatentDataModule
from acestep_lora.data.items import VAL_TIMESTEPS, Song
from acestep_lora.data.track import scan
from acestep_lora.errors import UserError
from acestep_lora.evaluate import Row

sys.path.insert(0, str(ROOT / "data"))
from procedural import HELD_OUT  # noqa: E402
from procedural import song as song_of  # noqa: E402

DEMO = ROOT / "data/demo"


@pytest.fixture(scope="module")
def finished(run):
    return run("trainer.max_steps=6", "trainer.check_val_every_n_epoch=1", "optimizer.lr=3e-3", "scheduler=constant")[1]


@pytest.fixture(scope="module")
def measure(configure, demo_cache, tmp_path_factory):
    """measure("adapter.path=...", ...) -> (Judge, rows, files), quick options first."""

    def go(*overrides: str):
        quick = ["hardware=cpu", "dataset.crop_seconds=2", "duration=2", "clips=2", "repeats=1", "adapter.scale=1"]
        folder = tmp_path_factory.mktemp("evaluation")
        cfg = configure("evaluate", *quick, f"dataset.cache_dir={demo_cache}", f"output_dir={folder}", *overrides)
        judge, rows = evaluate.evaluate(cfg)
        return judge, rows, evaluate.write(cfg, judge, rows)

    return go


@pytest.fixture(scope="module")
def evaluated(measure, finished):
    folders = sorted((finished / "checkpoints").iterdir())
    return measure(f"adapter.path=[{folders[0]},{finished}]", "adapter.scale=[0,0.5,1]")


def metrics(folder) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_loss_is_that_of_the_validation(evaluated, finished):
    _, rows, _ = evaluated
    last = [row for row in metrics(finished) if row["val/loss"]][-1]
    assert rows[0].name == "base model" and rows[0].error == 0
    assert rows[0].loss == pytest.approx(float(last["val/base_loss"]), rel=1e-5)
    trained = rows[-1]
    assert trained.loss == pytest.approx(float(last["val/loss"]), rel=1e-5) and trained.loss < rows[0].loss
    for level, loss in zip(VAL_TIMESTEPS, trained.losses, strict=True):
        assert loss == pytest.approx(float(last[f"val/loss_t={level}"]), rel=1e-5)


def test_adapters_are_compared_side_by_side_on_equal_terms(evaluated):
    judge, rows, _ = evaluated
    assert [(row.adapter == "base model", row.scale) for row in rows] == [
        (i == 0, s) for i, s in enumerate((0, 0.5, 1, 0.5, 1))
    ]
    assert len({row.adapter for row in rows}) == 3 and len({row.loss for row in rows}) == 5
    assert all(row.distance > 0 for row in rows)
    [head, *lines] = evaluate.table(rows)
    assert [line[0] for line in lines] == [row.adapter for row in sorted(rows, key=lambda row: row.loss)]
    assert "CLAP" not in head and len(lines[0]) == len(head)
    best = min(rows, key=lambda row: row.loss)
    assert evaluate.verdicts(rows)[0].startswith(f"{best.name} has the lowest loss, {best.loss:.4g}: ")
    assert judge.which == "held out"


def test_what_is_written_says_the_same(evaluated):
    _, rows, (told, picture, page) = evaluated
    found = json.loads(told.read_text(encoding="utf-8"))
    assert [row["loss"] for row in found["rows"]] == [row.loss for row in rows] and found["settings"]["clips"] == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    parsed = Page(page.read_text(encoding="utf-8"))
    players = parsed.attributes("audio", "src")
    assert len(players) == 2 * len(rows) and all((page.parent / path.replace("%20", " ")).is_file() for path in players)
    assert all(link.startswith("data:image/png;base64,") for link in parsed.attributes("img", "src"))


def test_a_kind_without_strength_is_measured_at_1(measure, run):
    folder = run("adapter=oft", "adapter.r=8", "trainer.max_steps=1")[1]
    _, rows, _ = measure(f"adapter.path={folder}", "adapter.scale=[0.5,1,1.5]", "clips=0")
    assert [row.scale for row in rows] == [0, 1] and rows[1].distance is None


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (["adapter.path=/nowhere"], "adapter.path=/nowhere does not exist"),
        (["adapter.path={a}", "songs=some"], "songs=some is neither held_out nor all"),
        (["adapter.path=[{a},{a}/]"], "is given twice"),
        (["adapter.path={a}", "clap=/nowhere"], "clap=/nowhere is not a CLAP model"),
        (["adapter.path={a}", "clips=1", "duration=1"], "1 clips are too few for the distance"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(measure, finished, overrides, reason):
    with pytest.raises(UserError, match=reason):
        measure(*(text.format(a=finished) for text in overrides))


def test_paths_are_told_apart_by_their_own_parts():
    assert runs.labels(["runs/x/a/adapter", "runs/x/b/adapter"]) == ["a", "b"]
    assert runs.labels(["runs/x/a/adapter", "runs/x/a/adapter_best"]) == ["adapter", "adapter_best"]
    assert runs.labels(["runs/x/a"]) == ["x/a"] and runs.labels(["/a", "/a/b"]) == ["a", "a/b"]


# ---------------------------------------------------------------- what is heard


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    """A demo song as two clips, with what its files say of it."""
    [track] = [track for track in scan(str(DEMO)).tracks if track.id == "glass_garden.mp3"]
    with spool(track.path, 16_000, tmp_path_factory.mktemp("spool")) as spooled:
        return track, [spooled.read().T] * 2


def test_tempo_and_key_are_heard(song):
    track, clips = song
    noise = [np.random.default_rng(0).normal(0, 0.1, (2, 16_000))] * 2
    for name in ("bpm", "keyscale"):
        wanted = [Song(track, None)] * 2
        assert evaluate.adherence(clips, 16_000, wanted, name) == 1
        assert evaluate.adherence([clips[0], noise[0]], 16_000, wanted, name) == 0.5
    assert evaluate.adherence(clips, 16_000, [Song(track.__class__(id="x", path=track.path), None)] * 2, "bpm") is None


def test_clap_from_a_local_folder(measure, finished, tmp_path, song):
    torch.manual_seed(0)
    audio = ClapAudioConfig(
        hidden_size=32, patch_embeds_hidden_size=16, depths=[1, 1], num_attention_heads=[2, 2], window_size=4,
        num_mel_bins=64, spec_size=256, patch_size=4, patch_stride=[4, 4], num_hidden_layers=2, projection_dim=8,
    )  # fmt: skip
    text = ClapTextConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    ClapModel(ClapConfig(audio_config=audio.to_dict(), text_config=text.to_dict(), projection_dim=8)).save_pretrained(
        tmp_path
    )
    ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(tmp_path)
    clap = evaluate.Clap(str(tmp_path), "cpu")
    rate = 16_000
    assert clap(np.zeros((2, 12 * rate)), rate).shape == (1, 8) and clap(np.zeros((2, 20 * rate)), rate).shape == (2, 8)
    _, rows, _ = measure(f"adapter.path={finished}", f"clap={tmp_path}", "songs=all")
    assert all(row.clap >= 0 for row in rows) and "CLAP" in evaluate.table(rows)[0]


def test_generation_with_the_adapter_in_place_is_that_of_its_file(nano, finished):
    """Sampled, a transformer in training makes the clips that the exported adapter makes."""
    judge_module = evaluate.FlowModule(
        nano, Adapter(partial(peft.PeftConfig), init_from=str(finished)), torch.optim.SGD
    )
    judge_module.load(torch.device("cpu"))
    request = generation.Request("lofi", duration=1.0, steps=2)
    live = generation.pipeline_around(generation.Sampled(judge_module.dit.eval()), nano, torch.float32, "cpu")
    loaded = generation.load_pipeline(nano, torch.float32, "cpu")
    generation.add_adapters(loaded, [str(finished)], [1.0])
    torch.testing.assert_close(
        generation.generate(live, request)[0], generation.generate(loaded, request)[0], atol=1e-4, rtol=0
    )


def test_ranking_is_by_the_least():
    rows = [Row("base model", 0, [1.0], 0, 5.0), Row("a", 1, [0.5], 0, 9.0), Row("b", 1, [0.7], 0, 2.0)]
    assert [evaluate.best(rows, name).adapter for name in ("loss", "distance")] == ["a", "b"]
    assert evaluate.verdicts([rows[0], Row("a", 1, [1.5], 0, 9.0)]) == [
        "By loss, none beats the base model.",
        "By distance, none beats the base model.",
    ]


# ---------------------------------------------------------------- what it is for


@pytest.fixture(scope="module")
def calypso(tmp_path_factory):
    """A style of its own, in twenty songs: with val_fraction=0.4, eight are held out."""
    folder = tmp_path_factory.mktemp("calypso")
    for seed in range(20):
        samples, truth = song_of(seed, 16_000, HELD_OUT, seconds=(9, 11))
        soundfile.write(folder / f"{seed}.wav", samples, 16_000)
        told = {"caption": truth.caption, "bpm": truth.bpm, "keyscale": truth.keyscale}
        (folder / f"{seed}.json").write_text(json.dumps(told | {"is_instrumental": True}), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_good_adapter_is_ranked_above_an_under_trained_and_an_over_trained_one(configure, calypso, tmp_path):
    """By held-out loss and by distance. The over-trained one has learnt three of the songs by heart."""
    import train

    split = [f"dataset.cache_dir={calypso}/.acestep", "dataset.val_fraction=0.4", "hardware=cpu"]
    common = [
        *split,
        "logger=csv",
        "sample=false",
        "previews.every_n_epochs=0",
        "training_report=false",
        "optimizer.lr=3e-3",
    ]

    def trained(name: str, *overrides: str) -> str:
        cfg = configure("train", *common, f"output_dir={tmp_path / name}", *overrides)
        train.train(cfg, tmp_path / name)
        return str(tmp_path / name)

    few = tmp_path / "few"
    few.mkdir()
    data = LatentDataModule(
        base=runs.find_base(configure("train").model), conditioning=Conditioning(), dir=str(calypso), val_fraction=0.4
    )
    data.encode(accelerator="cpu", devices=1)
    for song in data.split(data.songs)[0][:3]:
        for file in calypso.glob(f"{song.track.path.stem}.*"):
            shutil.copy(file, few)
    paths = {
        "under": trained("under", f"dataset.dir={calypso}", "trainer.max_steps=4"),
        "good": trained("good", f"dataset.dir={calypso}", "trainer.max_steps=240", "scheduler.warmup_steps=10"),
        "over": trained(
            "over", f"dataset.dir={few}", "trainer.max_steps=600", "optimizer.lr=1e-2", "scheduler.warmup_steps=10"
        ),
    }
    cfg = configure(
        "evaluate",
        *split,
        f"dataset.dir={calypso}",
        f"adapter.path=[{','.join(paths.values())}]",
        "adapter.scale=1",
        f"output_dir={tmp_path / 'evaluation'}",
    )
    judge, rows = evaluate.evaluate(cfg)
    evaluate.write(cfg, judge, rows)
    print(*evaluate.table(rows), *evaluate.verdicts(rows), sep="\n")
    found = {row.adapter: row for row in rows}
    for measure in ("loss", "distance"):
        value = {name: getattr(found[name], measure) for name in paths}
        assert value["good"] < min(value["under"], value["over"], getattr(rows[0], measure)), (measure, value)
