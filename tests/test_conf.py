"""Every YAML of conf/ composes with every command that has its group, and builds what it names."""

import inspect
import os
import subprocess
import sys

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from peft.tuners.tuners_utils import BaseTunerLayer

from acestep_lora import cli
from acestep_lora.adapters import Adapter
from acestep_lora.conditioning import Conditioning
from acestep_lora.dit import load_dit
from acestep_lora.hardware import Hardware

COMMANDS = sorted(path.stem for path in cli.CONF.glob("*.yaml"))
OPTIONS = sorted(tuple(path.relative_to(cli.CONF).with_suffix("").parts) for path in cli.CONF.glob("*/*.yaml"))
NETWORK = {("logger", "wandb")}


def options(group: str) -> list[str]:
    return [option for found, option in OPTIONS if found == group]


def groups(command: str) -> set[str]:
    """Config groups in a command's defaults list."""
    entries = OmegaConf.load(cli.CONF / f"{command}.yaml").defaults
    return {str(key) for entry in entries if isinstance(entry, DictConfig) for key in entry} & {g for g, _ in OPTIONS}


USES = [(command, *option) for command in COMMANDS for option in OPTIONS if option[0] in groups(command)]


@pytest.fixture(scope="module")
def composed(configure):
    """composed(command, group, option) -> configuration, each composed once."""
    known = {}

    def make(command: str, group: str, option: str) -> DictConfig:
        if (command, group, option) not in known:
            filled = {"export": ["adapter.path=x", "output=x"], "evaluate": ["adapter.path=x"]}.get(command, [])
            known[command, group, option] = configure(command, f"{group}={option}", *filled)
        return known[command, group, option]

    return make


@pytest.fixture(scope="module")
def option(composed):
    """option(group, name) -> that group's part of train.yaml."""
    return lambda group, name: composed("train", group, name)[group]


def nodes(node) -> list[DictConfig]:
    """Every node below that names a `_target_`."""
    if not isinstance(node, DictConfig | ListConfig) or node._is_none():
        return []
    children = node.values() if isinstance(node, DictConfig) else node
    own = [node] if isinstance(node, DictConfig) and "_target_" in node else []
    return own + [found for child in children for found in nodes(child)]


# ---------------------------------------------------------------- composition


def test_all_of_conf_is_looked_at():
    files = [path.relative_to(cli.CONF) for path in cli.CONF.rglob("*") if path.is_file()]
    files = [file for file in files if file.parts[0] != "hydra"]  # Hydra's own groups, tried below
    assert len(files) == len(OPTIONS) + len(COMMANDS) >= 42
    assert {"train", "preprocess", "generate", "export"} <= set(COMMANDS)
    assert {group for group, _ in OPTIONS} <= {group for command in COMMANDS for group in groups(command)}
    assert {"dataset", "model", "hardware"} <= groups("train") & groups("preprocess")


@pytest.mark.parametrize("use", USES, ids=" ".join)
def test_every_option_composes_and_resolves(composed, use):
    cfg = composed(*use)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def test_every_key_is_an_argument_of_what_it_configures(composed):
    checked = set()
    for use in USES:
        for node in nodes(composed(*use)):
            target = get_object(node._target_)
            parameters = inspect.signature(target).parameters
            if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                continue
            keys = {key for key in node if not key.startswith("_")}
            assert keys <= parameters.keys(), (use, node._target_, keys - parameters.keys())
            checked.add(node._target_)
    ours = {name for name in checked if name.startswith("acestep_lora.")}
    assert len(ours) >= 9 and len(checked) >= 17, checked


# ---------------------------------------------------------------- what the options build


@pytest.mark.parametrize("model, rates", [("turbo", (1e-4, 1e-3)), ("nano", (1e-3, 1e-2))])
def test_learning_rates_are_the_adapters_own_for_the_size_of_model(configure, model, rates):
    found = [configure("train", f"model={model}", f"adapter={name}").optimizer.lr for name in ("lora", "lokr")]
    assert found == pytest.approx(rates)


@pytest.mark.parametrize("name", options("optimizer"))
def test_optimizers_build_and_step(option, name):
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = instantiate(option("optimizer", name))([weight])
    expected = 1.0 if name == "prodigy" else 1e-3  # ten times an adapter's usual one: nano is small
    assert optimizer.param_groups[0]["lr"] == expected
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    for _ in range(3):
        weight.grad = torch.ones(4, 4)
        optimizer.step()
    assert (weight < 1).all() and weight.isfinite().all()


@pytest.mark.parametrize("name", options("adapter"))
def test_adapters_go_onto_the_model(option, nano, name):
    adapter = instantiate(option("adapter", name))
    assert isinstance(adapter, Adapter) and adapter.name == name
    dit = load_dit(nano.dit)
    count = adapter.inject(dit)
    adapted = [module for module in dit.modules() if isinstance(module, BaseTunerLayer)]
    assert len(adapted) == (0 if name == "none" else 6 * 8)
    assert count == sum(parameter.numel() for parameter in dit.parameters() if parameter.requires_grad) > 0


@pytest.mark.parametrize(
    "name, last", {"constant": 1, "constant_with_warmup": 1, "cosine": 0, "cosine_restarts": 0, "linear": 0}.items()
)
def test_schedulers_end_with_the_run(option, name, last):
    total, weight = 60, torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = instantiate(option("scheduler", name))(optimizer, total)
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(total):
        optimizer.step()
        scheduler.step()
        rates += scheduler.get_last_lr()
    assert rates[total] == pytest.approx(last, abs=1e-6)
    assert rates[0] == (1 if name == "constant" else 0)
    assert rates[total // 10] == max(rates) == pytest.approx(1)  # 100 steps of warmup are cut to a tenth of the run
    rises = sum(later > rate for rate, later in zip(rates[total // 10 :], rates[total // 10 + 1 :], strict=False))
    assert rises == (3 if name == "cosine_restarts" else 0)


def test_every_scheduler_is_tested():
    assert options("scheduler") == ["constant", "constant_with_warmup", "cosine", "cosine_restarts", "linear"]


@pytest.mark.parametrize("name", options("timesteps"))
def test_timesteps_cover_the_noise_levels(option, name):
    t = instantiate(option("timesteps", name))(torch.linspace(0, 1, 1001)[:-1])
    assert t.shape == (1000,) and t.dtype == torch.float32
    assert t.min() >= 0 and t.max() <= 1 and t.std() > 0.1
    assert (len(t.unique()) == 8) == (name == "discrete")


@pytest.mark.parametrize("name", options("hardware"))
def test_hardware_runs_here_or_says_which_it_is(option, name):
    hardware = instantiate(option("hardware", name))
    assert isinstance(hardware, Hardware)
    assert hardware.resolved_precision() in ("32-true", "bf16-mixed", "16-mixed")
    assert name != "cpu" or (hardware.device, hardware.dtype) == ("cpu", torch.float32)


@pytest.mark.parametrize("name", options("conditioning"))
def test_conditioning_differs_from_upstreams(option, name):
    conditioning = instantiate(option("conditioning", name))
    assert (conditioning == Conditioning()) == (name == "inference")
    assert conditioning.padded == (name == "upstream")


@pytest.mark.parametrize("name", options("dataset"))
def test_datasets_are_scanned(configure, nano, name, tmp_path):
    given = ["dataset.dir=" + str(cli.ROOT / "data/demo")] if name == "folder" else []
    cfg = configure("train", f"dataset={name}", f"dataset.cache_dir={tmp_path}", *given)
    data = instantiate(cfg.dataset, _partial_=True)(base=nano, conditioning=Conditioning())
    assert len(data.scan.tracks) == 8


@pytest.mark.parametrize("name", [name for name in options("logger") if ("logger", name) not in NETWORK])
def test_loggers_build(option, tmp_path, name):
    for node in option("logger", name).values():
        logger = instantiate(node)(save_dir=tmp_path)
        logger.log_metrics({"a": 1.0}, step=0)
        logger.finalize("success")
        assert any(tmp_path.rglob("*"))


@pytest.mark.parametrize("name", options("trainer"))
def test_trainers_build(option, name):
    open_ends = {"max_epochs": 1, "max_steps": -1, "check_val_every_n_epoch": 1, "log_every_n_steps": 1}
    trainer = instantiate(option("trainer", name), accelerator="cpu", logger=False, **open_ends)
    assert trainer.gradient_clip_val == 1.0 and trainer.accumulate_grad_batches == 4


@pytest.mark.parametrize("file", sorted(cli.CONF.glob("hydra/*/*.yaml")), ids=lambda file: file.stem)
def test_launchers_take_what_is_configured(file):
    node = OmegaConf.load(file)
    launcher = pytest.importorskip(node._target_.rpartition(".")[0])
    taken = inspect.signature(getattr(launcher, node._target_.rpartition(".")[2])).parameters
    assert {key for key in node if key != "_target_"} <= taken.keys() or "params" in taken
    assert file.stem != "submitit_slurm" or node.keys() == {"_target_", *_slurm()}


def _slurm() -> set[str]:
    """What the plugin itself has for Slurm."""
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

    return set(SlurmQueueConf.__dataclass_fields__) - {"_target_"}


# ---------------------------------------------------------------- what the options mean


@pytest.mark.parametrize("name", options("model"))
def test_models_bring_their_own_sampling(composed, name):
    cfg = composed("generate", "model", name)
    guided = {"base": (50, 1.0, 7.0), "sft": (50, 1.0, 7.0), "nano": (16, 3.0, 4.0)}.get(name.removeprefix("xl_"))
    assert (cfg.steps, cfg.shift, cfg.guidance_scale) == (guided or (8, 3.0, 1.0))
    assert composed("train", "model", name).dataset.condition_dropout == (0.15 if guided else 0.0)


def test_defaults_are_the_recommended_ones(configure):
    cfg = configure("train", "model=turbo")
    assert (cfg.adapter.r, cfg.adapter.alpha, cfg.adapter.dropout, cfg.optimizer.lr) == (64, 128, 0.0, 1e-4)
    assert (cfg.dataset.batch_size, cfg.trainer.accumulate_grad_batches, cfg.seed) == (1, 4, 42)
    assert (cfg.scheduler.name, cfg.scheduler.warmup_steps, cfg.optimizer.weight_decay) == ("cosine", 100, 0.01)


def test_learning_rate_follows_the_adapter_until_it_is_given(configure):
    assert configure("train", "model=turbo", "adapter=lokr").optimizer.lr == 1e-3
    assert configure("train", "adapter=lokr", "optimizer.lr=5e-4").optimizer.lr == 5e-4


def test_variants_of_lora_add_one_thing(option):
    lora, dora, rslora = (option("adapter", name) for name in ("lora", "dora", "rslora"))
    assert dora.config.use_dora and "use_dora" not in lora.config
    assert rslora.config.use_rslora
    assert rslora.alpha / rslora.r**0.5 == lora.alpha / lora.r == dora.alpha / dora.r


def test_prodigy_brings_its_schedule_and_the_command_line_wins(configure):
    cfg = configure("train", "optimizer=prodigy")
    assert (cfg.optimizer.lr, cfg.scheduler.name) == (1.0, "constant")
    cfg = configure("train", "scheduler=cosine", "optimizer=prodigy")
    assert (cfg.optimizer.lr, cfg.scheduler.name) == (1.0, "cosine")


def test_official_recipe_in_one_word(configure):
    cfg = configure("train", "experiment=official", "model=base")
    assert instantiate(cfg.conditioning) == Conditioning(
        lyric_header=False, lyric_tokens=512, padded=True, silence_timbre=False
    )
    table = instantiate(cfg.timesteps)(torch.arange(8) / 8)
    official = [1.0, 0.9545454545454546, 0.9, 0.8333333333333334, 0.75, 0.6428571428571429, 0.5, 0.3]
    torch.testing.assert_close(table, torch.tensor(official))
    assert (cfg.adapter.r, cfg.adapter.alpha, cfg.adapter.dropout) == (64, 128, 0.1)
    assert cfg.optimizer.lr == 3e-4
    assert (cfg.trainer.max_epochs, cfg.trainer.accumulate_grad_batches, cfg.dataset.batch_size) == (1000, 1, 1)
    assert cfg.dataset.condition_dropout == 0.0


def test_rounded_adapter_weights_are_refused(configure):
    with pytest.raises(InstantiationException) as caught:
        instantiate(configure("train", "hardware.precision=bf16-true").hardware)
    assert "hardware.precision=bf16-true" in cli.sentence(caught.value)
    assert "bf16-mixed" in cli.sentence(caught.value) and "\n" not in cli.sentence(caught.value)


# ---------------------------------------------------------------- typing errors


def complain(*arguments: str) -> str:
    """What train.py says to these arguments; it must be one line and an exit code of 1."""
    command = [sys.executable, str(cli.ROOT / "train.py"), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=60)
    assert done.returncode == 1 and done.stdout == "", done
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith(".")
    return line


@pytest.mark.parametrize(
    "typed, named",
    [
        ("adapter.rnak=4", ["adapter.rnak", "alpha, attention,", "r, rank_pattern"]),
        ("adaptr=lora", ["adaptr", "adapter, ", "optimizer"]),
        ("adapter=lokrr", ["adapter=lokrr", "dora, loha, lokr, lora, none, oft, rslora"]),
        ("sede=1", ["sede", "seed"]),
        ("optimizer.lr", ["optimizer.lr"]),
    ],
)
def test_misspelt_arguments_get_one_sentence_with_the_alternatives(typed, named):
    said = complain(typed)
    assert all(name in said for name in named), said


@pytest.mark.parametrize(
    "text, named",
    [
        ("defaults:\n  - override /adaptr: lora\n", ["adaptr", "adapter, ", "optimizer"]),
        ("adaptr:\n  r: 4\n", ["adaptr", "adapter, ", "optimizer"]),
        ("defaults:\n  - override /adapter: lokrr\n", ["adapter=lokrr", "lokr, lora"]),
    ],
    ids=["group", "key", "option"],
)
def test_misspelt_experiment_file_gets_one_sentence_with_the_alternatives(tmp_path, text, named):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(f"# @package _global_\n{text}", encoding="utf-8")
    said = complain("--config-dir", str(tmp_path), "experiment=mine")
    assert all(name in said for name in named), said


def test_right_experiment_file_is_found(tmp_path, configure):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /adapter: lokr\nadapter:\n  r: 4\n"
    (tmp_path / "experiment/mine.yaml").write_text(text, encoding="utf-8")
    cfg = configure("train", f"hydra.searchpath=['file://{tmp_path}']", "experiment=mine")
    assert (cfg.adapter.name, cfg.adapter.r) == ("lokr", 4)
