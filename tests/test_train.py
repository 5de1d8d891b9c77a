"""Real trainings on nano and the demo songs: one run, many witnesses."""

import csv
import json
import logging
import re
import shutil

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from acestep_lora import basemodel
from acestep_lora.adapters import Adapter, AdapterError, disabled
from acestep_lora.callbacks.checkpoints import checkpoint_folders
from acestep_lora.cli import ROOT
from acestep_lora.data.encode import stage
from acestep_lora.dit import load_dit
from acestep_lora.errors import UserError
from acestep_lora.hashes import FileHashes
from acestep_lora.runs import occupied, open_run

STEPS = (
    "trainer.max_steps=6", "trainer.accumulate_grad_batches=2", "trainer.check_val_every_n_epoch=1", "optimizer.lr=2e-3"
)  # fmt: skip
SAVE = ("save_every_n_steps=1", "keep_last=null")


def metrics(folder) -> list[dict]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(folder, name) -> dict[str, str]:
    return {row["step"]: row[name] for row in metrics(folder) if row.get(name)}


def adapter(folder, which="adapter"):
    return load_file(folder / which / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(run):
    """One run of six steps over two epochs, checkpointed at each; dataset.custom_tag set."""
    return run(*STEPS, *SAVE, "dataset.custom_tag=glimmer", "trainer.log_every_n_steps=1")


def test_run_leaves_what_it_should(finished):
    result, folder = finished
    left = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.csv", "train.log", "checkpoints", "adapter", "adapter_best"} <= left
    assert result.left_out == 0 and str(folder / "adapter") in result.message
    assert result.metric == pytest.approx(float(list(column(folder, "val/loss").values())[-1]))
    assert len(column(folder, "train/loss")) == 6
    for name in ("train/grad_norm", "lr", "val/base_loss", "val/loss_t=0.5", "perf/frames_per_s"):
        assert column(folder, name), name
    assert "trainable parameters" in (folder / "train.log").read_text()


def test_training_lowers_the_loss_below_the_base_models(finished):
    result, folder = finished
    base = {float(value) for value in column(folder, "val/base_loss").values()}
    assert len(base) == 1, "the baseline is measured once, on a fixed grid"
    assert result.metric < base.pop()


def test_checkpoint_holds_the_adapter_and_its_optimizer_only(finished):
    _, folder = finished
    path = checkpoint_folders(folder)[-1] / "state.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert all("lora_" in name for name in checkpoint["state_dict"])
    states = sum(t.numel() * t.element_size() for t in checkpoint["state_dict"].values())
    assert path.stat().st_size < 2 * 3 * states  # weights, and two moments each


def test_every_checkpoint_has_its_own_loadable_adapter(finished):
    _, folder = finished
    folders = checkpoint_folders(folder)
    assert len(folders) == 6
    tensors = [adapter(each) for each in folders]
    assert not torch.equal(*(next(iter(t.values())) for t in tensors[-2:]))
    last = adapter(folder)
    assert all(torch.equal(last[name], tensors[-1][name]) for name in last)


def test_metadata_says_what_and_not_where(finished):
    _, folder = finished
    with safe_open(folder / "adapter/adapter_model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["trigger_tag"] == "glimmer" and metadata["example_prompt"].startswith("glimmer, ")
    assert metadata["steps"] == "16" and metadata["shift"] == "3.0" and len(metadata["base_model_sha256"]) == 64
    everything = json.dumps(metadata) + (folder / "adapter/adapter_config.json").read_text()
    assert str(folder) not in everything and "/tmp" not in everything and "20" + "26-" not in everything


def test_same_seed_same_bytes(finished, run):
    _, first = finished
    _, second = run(*STEPS, "dataset.custom_tag=glimmer", "trainer.log_every_n_steps=1")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / "adapter" / name).read_bytes() == (second / "adapter" / name).read_bytes(), name
    assert column(first, "train/loss") == column(second, "train/loss")


@pytest.mark.parametrize("kept", [1, 3, 4])
def test_resume_is_exact(finished, run, tmp_path, kept):
    """From inside an epoch and from its end: the same losses, the same adapter, no step doubled or lost."""
    _, whole = finished
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    for folder in checkpoint_folders(part)[kept:]:
        shutil.rmtree(folder)
    run(*STEPS, *SAVE, "dataset.custom_tag=glimmer", "trainer.log_every_n_steps=1", "resume=auto", folder=part)
    for name in ("train/loss", "val/loss", "lr", "train/grad_norm"):
        assert column(part, name) == column(whole, name), name
    steps = [row["step"] for row in metrics(part)]
    assert len(steps) == len(set(steps))
    assert (part / "adapter/adapter_model.safetensors").read_bytes() == (
        whole / "adapter/adapter_model.safetensors"
    ).read_bytes()


def test_resume_after_the_end_says_so_and_a_larger_number_extends(finished, run, tmp_path):
    _, whole = finished
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    result, _ = run(*STEPS, "dataset.custom_tag=glimmer", "resume=auto", folder=copy)
    assert "is finished" in result.message
    run("trainer.max_steps=8", *STEPS[1:], "dataset.custom_tag=glimmer", "resume=auto", folder=copy)
    assert max(int(row["step"]) for row in metrics(copy)) >= 7


def test_damaged_checkpoint_falls_back_to_the_one_before(finished, run, tmp_path, caplog):
    _, whole = finished
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    last = checkpoint_folders(copy)[-1] / "state.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with caplog.at_level(logging.INFO):
        run(*STEPS, "dataset.custom_tag=glimmer", "resume=auto", folder=copy)
    assert "is damaged" in caplog.text and "step 5" in caplog.text
    assert column(copy, "train/loss").keys() == column(whole, "train/loss").keys()


def test_resume_refuses_another_adapter(finished, run, tmp_path):
    _, whole = finished
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    with pytest.raises(UserError, match="adapter.mlp was False and is True"):
        run("trainer.max_steps=9", "adapter.mlp=true", "resume=auto", folder=copy)


def test_used_folder_is_refused(finished, run):
    with pytest.raises(UserError, match="resume=auto.*overwrite=true"):
        run(*STEPS, folder=finished[1])


def test_rotation_keeps_the_last_and_the_best(run):
    _, folder = run(*STEPS, "save_every_n_steps=1", "keep_last=2", "keep_best=1")
    assert 2 <= len(checkpoint_folders(folder)) <= 3


def test_ema_is_what_is_exported_and_both_copies_are_kept(run):
    _, folder = run(*STEPS, *SAVE, "ema.decay=0.9")
    checkpoint = torch.load(checkpoint_folders(folder)[-1] / "state.ckpt", weights_only=True)
    (average,) = [state["average"] for name, state in checkpoint["callbacks"].items() if "EMA" in name]
    weights = checkpoint["state_dict"]
    assert average.keys() == weights.keys()
    name = "dit.layers.0.self_attn.to_q.lora_A.default.weight"
    exported = adapter(folder)["base_model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert torch.equal(exported, average[name]) and not torch.equal(exported, weights[name])


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "lokr", "loha", "oft"])
def test_every_adapter_starts_as_the_base_model_and_leaves_it_alone(nano, configure, kind):
    from hydra.utils import instantiate

    torch.manual_seed(0)
    base, dit = load_dit(nano.dit), load_dit(nano.dit)
    made: Adapter = instantiate(configure("train", f"adapter={kind}", "adapter.r=8").adapter)
    made.inject(dit)
    inputs = torch.randn(1, 20, 48), torch.tensor([0.4]), torch.randn(1, 5, 128), torch.randn(1, 20, 96)
    torch.testing.assert_close(dit(*inputs), base(*inputs), rtol=0, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in dit.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        dit(*inputs).square().mean().backward()
        optimizer.step()
    assert (dit(*inputs) - base(*inputs)).abs().max() > 1e-4
    with disabled(dit):
        torch.testing.assert_close(dit(*inputs), base(*inputs), rtol=0, atol=0)
    frozen = {name.replace("base_layer.", ""): p for name, p in dit.named_parameters() if not p.requires_grad}
    unchanged = [torch.equal(p, frozen[name]) for name, p in base.named_parameters()]
    assert len(unchanged) == len(frozen) and all(unchanged)


@pytest.mark.parametrize("options, modules", [
    ({"attention": "self"}, 24), ({"attention": "cross"}, 24), ({"attention": "none", "mlp": True}, 18),
    ({"layers": "1-2"}, 16), ({"layers": "0,3", "mlp": True}, 22),
    ({"rank_pattern": {"layers.0.self_attn.q_proj": 0, "layers.1.self_attn.q_proj": 3}}, 47),
])  # fmt: skip
def test_exactly_the_asked_modules_are_adapted(nano, options, modules):
    import functools

    from peft import LoraConfig

    dit = load_dit(nano.dit)
    Adapter(functools.partial(LoraConfig, r=4, lora_alpha=8), r=4, alpha=8, **options).inject(dit)
    ranks = [m.r["default"] for m in dit.modules() if hasattr(m, "lora_A")]
    assert len(ranks) == modules
    if "rank_pattern" in options:
        layer = dit.layers[1].self_attn.to_q
        assert sorted(set(ranks)) == [3, 4] and layer.scaling["default"] == pytest.approx(2)


@pytest.mark.parametrize("options, message", [
    ({"r": 0}, "got 0"), ({"attention": "all"}, "got all"), ({"attention": "none"}, "adapts nothing"),
    ({"layers": "2-9"}, "layers 0 to 5"), ({"layers": "x"}, "layers=x"), ({"dropout": 1.0}, "got 1.0"),
    ({"rank_pattern": {"layers.0.self_attn.qproj": 4}}, "qproj"), ({"rank_pattern": {"a": -1}}, "'a': -1"),
    ({"rank_pattern": "nowhere.yaml"}, "nowhere.yaml"),
])  # fmt: skip
def test_impossible_adapters_are_refused_by_value(nano, options, message):
    import functools

    from peft import LoraConfig

    with pytest.raises(AdapterError, match=message):
        Adapter(functools.partial(LoraConfig, r=4), **options).inject(load_dit(nano.dit))


def test_lokr_factor_that_could_not_travel_is_refused(nano, configure):
    from hydra.utils import instantiate

    with pytest.raises(AdapterError, match="factor=16"):
        instantiate(configure("train", "adapter=lokr", "adapter.factor=16").adapter).inject(load_dit(nano.dit))


def test_init_from_continues_an_adapter(finished, run):
    _, folder = finished
    _, again = run("trainer.max_steps=1", "optimizer.lr=0", f"adapter.init_from={folder / 'adapter'}")
    before, after = adapter(folder), adapter(again)
    for name in before:
        torch.testing.assert_close(before[name], after[name])


def test_dropout_is_a_function_of_the_step(run, tmp_path):
    options = ("trainer.max_steps=3", "trainer.accumulate_grad_batches=2", "adapter.dropout=0.5", *SAVE)
    _, whole = run(*options)
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    for folder in checkpoint_folders(part)[1:]:
        shutil.rmtree(folder)
    run(*options, "resume=auto", folder=part)
    assert column(part, "train/loss") == column(whole, "train/loss")


def test_accumulation_equals_one_batch(run):
    """Two items per step, in one batch or in two: the same gradient, the last partial window included."""
    options = ("trainer.max_epochs=1", "trainer.log_every_n_steps=1", "dataset.val_fraction=0.3")
    _, split = run(*options, "dataset.batch_size=1", "trainer.accumulate_grad_batches=4")
    _, joint = run(*options, "dataset.batch_size=4", "trainer.accumulate_grad_batches=1")
    for name in ("train/loss", "train/grad_norm"):
        one, other = column(split, name), column(joint, name)
        assert one.keys() == other.keys() and len(one) == 2
        for step in one:
            assert float(one[step]) == pytest.approx(float(other[step]), rel=1e-4), name


def test_overfitting_one_song_lowers_its_fixed_grid_loss(run, tmp_path, configure):
    """LoRA r64, lr 1e-3, 25 steps on one song: at least 20 %, even though nano's weights are random."""
    song = tmp_path / "song"
    song.mkdir()
    tone = np.sin(np.arange(22050 * 3)[:, None] * np.array([[0.05, 0.07]])) * 0.4
    soundfile.write(song / "tone.wav", tone, 22050)
    result, folder = run(
        f"dataset.dir={song}", f"dataset.cache_dir={tmp_path / 'c'}", "optimizer.lr=1e-3", "trainer.max_steps=25",
        "trainer.accumulate_grad_batches=1", "trainer.check_val_every_n_epoch=25", "scheduler=constant",
    )  # fmt: skip
    base = float(next(iter(column(folder, "val/base_loss").values())))
    assert result.metric < 0.8 * base


def test_a_new_kind_of_adapter_is_one_yaml(run, tmp_path):
    """The one the README shows, trained and exported."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (yaml,) = re.findall(r"```yaml\n(_target_.*?)```", readme, re.DOTALL)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/hra.yaml").write_text(yaml)
    result, folder = run(f"hydra.searchpath=[file://{tmp_path}]", "adapter=hra", "trainer.max_steps=2")
    assert result.metric is not None
    assert any("hra" in name for name in adapter(folder))


def test_two_stages_are_never_resident_together(nano):
    """The check itself: a reference that outlives its stage is an error."""
    import lightning as L

    def load():
        module = L.LightningModule()
        module.vae = basemodel.load_vae(nano, torch.float32, "cpu")
        return module

    stage("VAE", load, lambda module: None)
    kept = []
    with pytest.raises(RuntimeError, match="still in memory"):
        stage("VAE", load, kept.append)


def test_adapter_is_loaded_by_plain_diffusers(finished, nano):
    from diffusers import AceStepPipeline

    _, folder = finished
    pipeline = AceStepPipeline.from_pretrained(nano.dit.parent)
    pipeline.load_lora_weights(str(folder / "adapter"))
    loaded = {name for name, _ in pipeline.transformer.named_parameters() if "lora_" in name}
    assert len(loaded) == len(adapter(folder))


def test_file_hashes_are_remembered_and_follow_the_file(tmp_path):
    file, hashes = tmp_path / "a", FileHashes(tmp_path / "h.json")
    file.write_bytes(b"one")
    first = hashes.file(file)
    hashes.save()
    again = FileHashes(tmp_path / "h.json")
    assert again.known and again.file(file) == first
    file.write_bytes(b"three")
    assert again.file(file) != first


def test_resume_finds_the_run_a_checkpoint_belongs_to(finished, tmp_path):
    """By a checkpoint's path, and by `auto` among the runs of one name; what cannot be read is refused."""
    _, folder = finished
    third = checkpoint_folders(folder)[2]
    run = open_run(tmp_path / "new", "demo", resume=str(third), overwrite=False, given=False)
    assert (run.folder, run.checkpoint, run.step) == (folder, third / "state.ckpt", 3)
    run = open_run(folder.with_name("later"), "demo", resume="auto", overwrite=False, given=False)
    assert (run.folder, run.step) == (folder, 6)
    run = open_run(tmp_path / "none" / "yet", "demo", resume="auto", overwrite=False, given=False)
    assert (run.folder, run.checkpoint) == (tmp_path / "none" / "yet", None)
    (tmp_path / "state.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        open_run(tmp_path / "new", "demo", resume=str(tmp_path / "state.ckpt"), overwrite=False, given=False)


def test_overwrite_clears_what_a_run_left_and_nothing_else(tmp_path):
    for name in ("checkpoints/epoch_0000-step_000001/state.ckpt", "adapter/a", "metrics.csv", "my_notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with occupied(open_run(tmp_path, "demo", resume=None, overwrite=True, given=True)):
        assert {path.name for path in tmp_path.iterdir()} == {"my_notes.txt", "train.log", ".lock"}
