"""Sensitivity against exact gradients and a planted module; its cost; ranks under a budget; the command, end to end."""

import functools
import itertools
import json

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from peft import LoraConfig
from safetensors.torch import load_file
from scipy.stats import spearmanr

from acestep_lora import bench, costs, plan, ranks, sensitivity
from acestep_lora.adapters import Adapter
from acestep_lora.basemodel import constants
from acestep_lora.data.items import collate
from acestep_lora.dit import AceStepDiT, load_dit
from acestep_lora.errors import UserError
from acestep_lora.module import FlowModule
from acestep_lora.naming import to_diffusers

LORA = functools.partial(LoraConfig, r=4)


def probed(nano, dit, columns: int = 10**6, **options) -> FlowModule:
    probes = sensitivity.Probes(Adapter(LORA, mlp=True, **options), seed=0, columns=columns)
    module = FlowModule(nano, probes, optimizer=torch.optim.SGD)
    module.take(dit, *constants(nano))
    return module


def item(frames: int, seed: int, tokens: int = 9) -> dict:
    torch.manual_seed(seed)
    state = {"latents": torch.randn(frames, 48), "noise": torch.randn(frames, 48)} | {
        "condition": torch.randn(tokens, 128)
    }
    fixed = {"dropped": False, "weight": 1.0, "level": 0, "window": 1, "key": seed, "hints": None, "track": str(seed)}
    return state | fixed | {"t": 0.2 + 0.2 * seed}


def told(module: FlowModule, *items: dict, key: int = 0) -> torch.Tensor:
    module.adapter.restart()
    module.adapter.draw(key)
    module.losses(collate(list(items))).sum().backward()
    return module.adapter.squares.clone()


@pytest.fixture(scope="module")
def exact(nano):
    """Squared gradients of every adaptable weight by plain autograd, summed over two items."""
    dit = load_dit(nano.dit)
    module = probed(nano, dit)
    names = module.adapter.names
    dit.requires_grad_(True)
    total = torch.zeros(len(names))
    for each in (item(40, 1), item(57, 2)):
        dit.zero_grad()
        module.losses(collate([each])).sum().backward()
        total += torch.stack([dit.get_submodule(to_diffusers(name)).weight.grad.square().sum() for name in names])
    return names, total


@pytest.mark.parametrize("recompute", [0, 3])
def test_squared_gradients_are_those_of_autograd(nano, exact, recompute):
    """In a padded batch, nothing of the model trainable, with and without recomputed layers."""
    names, expected = exact
    module = probed(nano, load_dit(nano.dit))
    module.dit.recompute = frozenset(range(recompute))
    assert module.adapter.names == names and not module.trainable()
    torch.testing.assert_close(told(module, item(40, 1), item(57, 2)), expected, rtol=1e-3, atol=0)


def test_random_columns_keep_the_expectation(nano, exact):
    _, expected = exact
    module = probed(nano, load_dit(nano.dit), columns=16)
    items = item(40, 1), item(57, 2)
    draws = torch.stack([told(module, *items, key=key) for key in range(40)])
    assert (draws.mean(0) / expected - 1).abs().max() < 0.3 and (draws.mean() / expected.mean() - 1).abs() < 0.05
    assert torch.equal(told(module, *items, key=3), draws[3])


def test_a_planted_module_is_found(nano):
    """The same function, in which one module takes inputs 30 times as large: its gradient is 900 times what it was."""
    dit = load_dit(nano.dit)
    dit.layers[2].mlp.up_proj.weight.data *= 30
    dit.layers[2].mlp.down_proj.weight.data /= 30
    module = probed(nano, dit, columns=16)
    scores = told(module, item(40, 1), item(57, 2)) / torch.tensor(
        [module.dit.get_submodule(to_diffusers(name)).weight.numel() for name in module.adapter.names]
    )
    assert module.adapter.names[int(scores.argmax())] == "layers.2.mlp.down_proj"


def test_what_is_excluded_is_not_measured(nano):
    module = probed(nano, load_dit(nano.dit), attention="cross", layers="1-2", rank_pattern={"layers.1.mlp.up_proj": 0})
    names = module.adapter.names
    assert len(names) == 2 * 7 - 1 and "layers.1.mlp.up_proj" not in names
    assert all(name.split(".")[1] in "12" and "self_attn" not in name for name in names)
    assert (told(module, item(40, 1)) > 0).all()


def test_a_pass_costs_what_a_training_step_costs(configure):
    """FLOPs of two passes under three epochs', peak memory under a training step's."""
    size = ["model=mid", "hardware=cpu", "dataset.crop_seconds=20", "model.shape.transformer.num_hidden_layers=2"]
    cfg = configure("train", *size, "trainer.accumulate_grad_batches=1")
    job = plan.job_of(cfg, instantiate(cfg.hardware), None)

    def watched() -> FlowModule:
        probes = FlowModule(None, sensitivity.Probes(instantiate(cfg.adapter), 0), optimizer=torch.optim.SGD)
        dit = AceStepDiT(**job.shape).requires_grad_(False)
        probes.take(dit, torch.zeros(job.condition_width), torch.zeros(job.frames, 64))
        return probes

    def run() -> None:
        probes = watched()
        probes.adapter.draw(0)
        for _ in range(2):
            sensitivity._backward(probes, job.batch(), job.hardware)

    cpu = torch.device("cpu")
    assert bench.peak(run, cpu) < 1.0 * bench.peak_of(job, cpu)
    probes, batch = watched(), job.batch()
    probes.adapter.draw(0)
    flops = costs.count(lambda: sensitivity._backward(probes, batch, job.hardware))
    assert flops < 1.05 * plan.count_flops(job)[0]


# ---------------------------------------------------------------- ranks


def lacking(gains: dict, given: dict) -> float:
    return sum(gain / (1 + given[name]) for name, gain in gains.items())


def test_ranks_are_the_best_there_are():
    """Against every allocation of a small problem."""
    gains, prices = {"a": 9.0, "b": 3.0, "c": 0.5, "d": 3.0}, {"a": 2, "b": 1, "c": 1, "d": 3}
    budget = 20
    given = ranks.share_out(gains, prices, budget, step=1, largest=8)
    every = (dict(zip(gains, each, strict=True)) for each in itertools.product(range(9), repeat=4))
    best = min(lacking(gains, each) for each in every if sum(prices[name] * each[name] for name in gains) <= budget)
    assert sum(prices[name] * rank for name, rank in given.items()) <= budget
    assert lacking(gains, given) == pytest.approx(best, rel=0.03)
    assert given["b"] > given["c"] and given["b"] > given["d"]


def test_ranks_keep_step_and_bounds():
    given = ranks.share_out({"a": 1e9, "b": 1.0}, {"a": 1, "b": 1}, budget=10_000, step=8, largest=60)
    assert given == {"a": 56, "b": 56}
    with pytest.raises(UserError, match="takes 8 parameters"):
        ranks.share_out({"a": 1.0}, {"a": 1}, budget=7, step=8)


@pytest.mark.parametrize(
    "text, count", [("44M", 44_000_000), ("5.5m", 5_500_000), ("800k", 800_000), (123, 123), ("1e6", 10**6)]
)
def test_budgets_as_people_write_them(text, count):
    assert ranks.parse_count(text) == count


@pytest.mark.parametrize("text", ["44MB", "-3", "", "0", "much"])
def test_other_budgets_are_refused(text):
    with pytest.raises(UserError, match="budget="):
        ranks.parse_count(text)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def measured(configure, demo_cache, tmp_path_factory):
    """measured("seed=2", ...) -> the folder that the command wrote."""

    def go(*overrides: str):
        folder = tmp_path_factory.mktemp("sensitivity")
        quick = ["hardware=cpu", "dataset.crop_seconds=2", f"dataset.cache_dir={demo_cache}", "adapter.r=8"]
        assert sensitivity.main(configure("sensitivity", *quick, f"output_dir={folder}", *overrides)) == 0
        return folder

    return go


@pytest.fixture(scope="module")
def first(measured):
    return measured("budget=20k", "keep=12")


def scores(folder) -> dict[str, float]:
    return {
        each["module"]: each["sensitivity"] for each in json.loads((folder / "sensitivity.json").read_text())["modules"]
    }


def test_two_seeds_agree_and_one_seed_repeats_itself(first, measured):
    one, other, again = scores(first), scores(measured("seed=7")), scores(measured())
    assert spearmanr(list(one.values()), [other[name] for name in one]).statistic >= 0.8
    assert one == again and one != other


def test_files_are_complete(first):
    told = json.loads((first / "sensitivity.json").read_text())
    assert len(told["modules"]) == 48 and len(told["blocks"]) == 6 and len(told["kinds"]) == 8
    assert sum(each["gradient"] for each in told["blocks"].values()) == pytest.approx(1)
    assert all(len(each["gradient"]) == 2 and each["spread"] >= 0 for each in told["modules"])
    assert (first / "sensitivity.png").read_bytes().startswith(b"\x89PNG")


def test_training_takes_the_pattern_and_adapts_nothing_else(first, run):
    pattern = yaml.safe_load((first / "rank_pattern.yaml").read_text())
    chosen = {name: rank for name, rank in pattern.items() if rank}
    assert len(pattern) == 6 * 11 and 0 < len(chosen) <= 12
    for given in (f"@{first / 'rank_pattern.yaml'}", f"{first / 'rank_pattern.yaml'}"):
        _, folder = run(f"adapter.rank_pattern={given}", "adapter.r=8", "trainer.max_steps=1")
        tensors = load_file(folder / "adapter/adapter_model.safetensors")
        trained = {
            name.removeprefix("base_model.model."): tensor.shape[0]
            for name, tensor in tensors.items()
            if "lora_A" in name
        }
        assert {name.removesuffix(".lora_A.weight"): rank for name, rank in trained.items()} == chosen
        count = sum(tensor.numel() for tensor in tensors.values())
        assert count <= 20_000 and count == json.loads((first / "sensitivity.json").read_text())["parameters"]


def test_measured_gradients_are_shared_out_anew_and_compared(first, measured, capsys):
    again = measured(f"measured={first / 'sensitivity.json'}", "budget=40k", f"against={first / 'sensitivity.json'}")
    assert scores(again) == scores(first)
    told = json.loads((again / "sensitivity.json").read_text())
    assert told["spearman"] == pytest.approx(1) and 20_000 < told["parameters"] <= 40_000
    assert "where the two differ most" in capsys.readouterr().out


@pytest.mark.parametrize("adapter", ["rslora", "dora", "loha"])
def test_budgets_hold_for_other_adapters(first, measured, adapter, configure):
    folder = measured(f"measured={first / 'sensitivity.json'}", f"adapter={adapter}", "budget=30k", "rank_max=16")
    told = json.loads((folder / "sensitivity.json").read_text())
    assert 0 < told["parameters"] <= 30_000


@pytest.mark.parametrize("overrides, message", [
    (["budget=lots"], "budget=lots"), (["budget=10"], "budget=10 is too small"),
    (["against=nowhere.json"], "nowhere.json"),
    (["adapter=lokr"], "adapter=lokr does not grow"), (["adapter=oft"], "rank_pattern"), (["repeats=0"], "repeats=0"),
])  # fmt: skip
def test_what_cannot_be_is_refused(first, measured, overrides, message):
    with pytest.raises(UserError, match=message):
        measured(f"measured={first / 'sensitivity.json'}", *overrides)


def test_spread_of_one_pass_is_unknown():
    found = sensitivity.Sensitivity(["layers.0.mlp.up_proj"], np.ones((1, 1)), np.ones(1))
    assert np.isnan(found.spread).all()
