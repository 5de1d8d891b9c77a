"""Prior preservation: what is measured, what it costs the new style, and that runs with it are as exact as others."""

import shutil

import pytest
import torch
from test_sensitivity import item
from test_train import adapter, column

from acestep_lora.adapters import disabled
from acestep_lora.basemodel import constants
from acestep_lora.callbacks.checkpoints import checkpoint_folders
from acestep_lora.data.items import collate
from acestep_lora.data.prior import read_prompts
from acestep_lora.dit import load_dit
from acestep_lora.errors import UserError
from acestep_lora.flow import noisy

EPOCHS = ("trainer.max_epochs=3", "trainer.accumulate_grad_batches=2", "trainer.check_val_every_n_epoch=1")
LOGGED = ("trainer.log_every_n_steps=1", "keep_last=null", "optimizer.lr=3e-3", "dataset.val_fraction=0.5")


@pytest.fixture(scope="module")
def measured(run):
    return run(*EPOCHS, *LOGGED, "preservation.weight=0")[1]


@pytest.fixture(scope="module")
def held(run):
    return run(*EPOCHS, *LOGGED, "preservation.weight=10", "preservation.prompts=[solo piano, a loud rock band]")[1]


def test_drift_is_the_distance_to_the_base_model(nano, configure):
    from hydra.utils import instantiate

    from acestep_lora.module import FlowModule

    module = FlowModule(
        nano, instantiate(configure("train", "adapter.r=4").adapter), optimizer=torch.optim.SGD, preservation=2.0
    )
    module.take(load_dit(nano.dit), *constants(nano))
    prompts = [torch.randn(7, 128), torch.randn(5, 128)]
    batch = collate([item(40, 1) | {"prior": prompts[0]}, item(57, 2) | {"prior": prompts[1]}])
    assert (module.drift(batch) == 0).all()
    for parameter in module.trainable().values():
        torch.nn.init.normal_(parameter, std=0.1)
    drift = module.drift(batch)
    for i, frames in enumerate((40, 57)):
        x_t = noisy(batch.latents, batch.noise, batch.t)[i : i + 1, :frames]
        context = torch.cat([module.silence[:frames], torch.ones(frames, 48)], dim=1)[None]
        inputs = x_t, batch.t[i : i + 1], prompts[i][None], context
        moved = module.dit(*inputs)
        with disabled(module.dit):
            expected = (moved - module.dit(*inputs)).square().mean()
        torch.testing.assert_close(drift[i], expected, rtol=1e-4, atol=1e-6)
    objective, losses, drifts = module.objective(batch)
    torch.testing.assert_close(objective, losses + 2 * drifts)
    module.drift(batch).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.trainable().values())
    frozen = [parameter for name, parameter in module.named_parameters() if name not in module.trainable()]
    assert frozen and all(parameter.grad is None for parameter in frozen)


def test_preservation_keeps_the_model_and_measuring_changes_nothing(measured, held, run):
    drifts = [list(map(float, column(folder, "val/prior_loss").values())) for folder in (measured, held)]
    assert len(drifts[0]) == 3 and drifts[1][-1] < 0.7 * drifts[0][-1]
    assert column(measured, "train/prior_loss")["0"] == "0.0", "an adapter starts as the base model"
    _, plain = run(*EPOCHS, *LOGGED)
    assert column(plain, "train/loss") == column(measured, "train/loss") and not column(plain, "val/prior_loss")


def test_resumed_runs_go_on_exactly(held, run, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(held, part)
    for folder in checkpoint_folders(part)[1:]:
        shutil.rmtree(folder)
    again = ("preservation.weight=10", "preservation.prompts=[solo piano, a loud rock band]", "resume=auto")
    run(*EPOCHS, *LOGGED, *again, folder=part)
    for name in ("train/loss", "train/prior_loss", "val/loss", "val/prior_loss"):
        assert column(part, name) == column(held, name), name
    assert all(torch.equal(tensor, adapter(held)[name]) for name, tensor in adapter(part).items())


def test_prompts_do_not_depend_on_how_a_step_is_cut(run):
    options = ("trainer.max_epochs=1", "trainer.log_every_n_steps=1", "preservation.weight=1")
    _, split = run(*options, "dataset.batch_size=1", "trainer.accumulate_grad_batches=4")
    _, joint = run(*options, "dataset.batch_size=4", "trainer.accumulate_grad_batches=1")
    for name in ("train/loss", "train/grad_norm", "train/prior_loss"):
        one, other = column(split, name), column(joint, name)
        assert one.keys() == other.keys() and len(one) == 2
        for step in one:
            assert float(one[step]) == pytest.approx(float(other[step]), rel=1e-4, abs=1e-9), name


def test_prompts_are_read_from_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("solo piano\n\n rock, band \n", encoding="utf-8")
    assert read_prompts(f"@{tmp_path / 'prompts.txt'}") == ["solo piano", "rock, band"]
    assert read_prompts(["a", " b"]) == ["a", "b"]


@pytest.mark.parametrize("prompts", [[], "@nowhere.txt", ["  "]])
def test_no_prompts_are_refused(prompts):
    with pytest.raises(UserError, match="preservation.prompts"):
        read_prompts(prompts)
