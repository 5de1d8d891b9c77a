"""Recipes: what their headers claim, the list, and a run's settings saved as one."""

import logging
import re
import sys

import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from acestep_lora import cli, plan, presets

RECIPES = sorted(path.stem for path in (cli.CONF / "experiment").glob("*.yaml"))
MEMORY = re.compile(r"(\d+\.\d) GiB predicted \((.*), songs of (\d+) s\)\.")


def told(name: str) -> dict[str, str]:
    return presets.header(cli.CONF / f"experiment/{name}.yaml")


@pytest.fixture
def command(monkeypatch, capsys):
    """command("save=...", ...) -> (exit code, output, errors) of `python -m acestep_lora.presets`."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def go(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["presets", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main("presets", presets.main)
        return end.value.code, *capsys.readouterr()

    yield go
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


# ---------------------------------------------------------------- the shipped ones


def test_the_common_wishes_have_one():
    assert {"quick", "style_few", "style_many", "voice", "instrument", "low_vram", "high_quality"} < set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_is_for_and_keeps_to_its_memory(configure, name):
    said = told(name)
    assert all(len(said[key]) > 20 for key in ("for", "when", "why"))
    claim, overrides, seconds = MEMORY.fullmatch(said["memory"]).groups()
    cfg = configure("train", f"experiment={name}", *overrides.split(", "), "hardware.accelerator=gpu")
    job = plan.job_of(cfg, instantiate(cfg.hardware), None, float(seconds))
    needed = plan.predict(job).total / plan.GIB
    assert 0.95 * float(claim) < needed <= float(claim)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(run, name):
    result, folder = run(f"experiment={name}", "trainer.max_steps=1", "trainer.max_epochs=1")
    assert (folder / "adapter/adapter_model.safetensors").is_file() and result.left_out == 0


# ---------------------------------------------------------------- a run's settings

RUNS = {
    "nothing": [],
    "another kind": ["adapter=lokr", "adapter.factor=4", "optimizer.lr=5e-4", "dataset.custom_tag=mine"],
    "prodigy": ["optimizer=prodigy", "timesteps=mixture", "timesteps.weights=[0.5,0.5]"],
    "a recipe": ["experiment=low_vram", "model=xl_turbo", "hardware=gpu_12gb", "ema.decay=0.99"],
    "songs": ["dataset=folder", "dataset.dir=/music/it's mine", "dataset.crop_seconds=60", "logger=csv", "seed=7"],
    "official": ["experiment=official", "model=base", "output_dir=somewhere", "trainer.max_epochs=3"],
}


@pytest.mark.parametrize("overrides", RUNS.values(), ids=RUNS)
def test_a_saved_recipe_makes_the_runs_configuration(overrides, command, configure, tmp_path):
    run, output = tmp_path / "run", tmp_path / "mine/experiment/dark.yaml"
    run.mkdir()
    before = configure("train", *overrides)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(before), encoding="utf-8")
    code, out, err = command(f"save={run}", f"output={output}", "description=Dark, it's mine: 40 songs")
    assert code == 0 and f"--config-dir {tmp_path / 'mine'} experiment=dark" in out, err
    machine = [text for text in overrides if text.startswith(("model=", "dataset=", "hardware=", "logger="))]
    after = configure("train", f"hydra.searchpath=['file://{tmp_path / 'mine'}']", *machine, "experiment=dark")
    wanted, made = (presets.flat(OmegaConf.to_container(cfg)) for cfg in (before, after))
    assert all(map(presets.personal, {key for key in wanted.keys() | made.keys() if wanted.get(key) != made.get(key)}))
    text = output.read_text(encoding="utf-8")
    assert str(tmp_path) not in text and "/music" not in text and "custom_tag" not in text
    assert len(yaml.safe_load(text) or []) <= 8
    code, out, err = command("--config-dir", str(tmp_path / "mine"))
    assert "Dark, it's mine: 40 songs" in out


def test_a_finished_run_becomes_a_recipe(run, command, configure, tmp_path):
    """Of a real run, whose config.yaml is as train.py leaves it; an adapter of one's own needs its folder."""
    (tmp_path / "adapter").mkdir()
    hra = "defaults: [lora]\nname: hra\nconfig:\n  use_rslora: true\n  lora_bias: false\n"
    (tmp_path / "adapter/hra.yaml").write_text(hra, encoding="utf-8")
    search = f"hydra.searchpath=['file://{tmp_path}']"
    _, folder = run(search, "adapter=hra", "adapter.r=4", "trainer.max_steps=1", "trainer.accumulate_grad_batches=1")
    given = ["--config-dir", str(tmp_path), f"save={folder}", f"output={tmp_path / 'experiment/mine.yaml'}"]
    assert command(*given)[0] == 0
    cfg = configure("train", search, "experiment=mine")
    assert (cfg.adapter.name, cfg.adapter.r, cfg.trainer.max_steps) == ("hra", 4, 1)
    assert cfg.dataset.cache_dir is None


def test_the_list_shows_each_with_its_description(command):
    code, out, _ = command()
    words = " ".join(re.sub("[│┃]", " ", out).split())
    assert code == 0
    for name in RECIPES:
        assert name in words and " ".join(told(name)["for"].split()[:2]) in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["save=nowhere"], "Where to? output=FOLDER/experiment/NAME.yaml"),
        (["save=nowhere", "output=x/experiment/mine.yaml"], "nowhere is no run"),
        (["save=.", "output=mine.yaml"], "error: "),
    ],
)
def test_what_cannot_be_saved_is_told(arguments, message, command):
    code, out, err = command(*arguments)
    assert code == 1 and message in err and err.count("\n") == 1
