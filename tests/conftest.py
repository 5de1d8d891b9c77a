"""Shared fixtures: the golden vectors, the shipped nano model, composed configurations, and one finished run."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from acestep_lora import basemodel, cli

ROOT = cli.ROOT
HERE = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # train.py and the other commands are scripts, not a package
os.environ["WANDB_MODE"] = "disabled"
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl+C


@pytest.fixture(autouse=True, scope="session")
def home(tmp_path_factory):
    """File hashes are remembered in a folder of the tests' own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def goldens() -> dict[str, torch.Tensor]:
    """Inputs, and what the official modelling code made of them (tests/goldens/README.md)."""
    return load_file(HERE / "goldens/inputs.safetensors") | load_file(HERE / "goldens/expected.safetensors")


@pytest.fixture(scope="session")
def golden_variant() -> Path:
    return HERE / "goldens/original/acestep-v15-turbo"


@pytest.fixture(scope="session")
def nano() -> basemodel.BaseModel:
    return basemodel.find(str(ROOT / "data/models/nano"), variant="nano", repo="acestep-lora")


@pytest.fixture(scope="session")
def configure():
    """configure("train", "trainer.max_steps=2") -> the real configuration, composed."""

    def make(command: str, *overrides: str):
        cli.register()
        with initialize_config_dir(str(cli.CONF), version_base="1.3"):
            return compose(command, overrides=cli.quote_overrides(list(overrides)))

    return make


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def run(configure, demo_cache, tmp_path_factory):
    """run("trainer.max_steps=2", ...) -> (Result, folder): a real training on the demo songs, quick options first."""
    import train

    def go(*overrides: str, folder: Path | None = None):
        folder = folder or tmp_path_factory.mktemp("run") / "out"
        quick = [
            "logger=csv",
            "sample=false",
            "previews.every_n_epochs=0",
            "training_report=false",
            "hardware=cpu",
            "dataset.crop_seconds=2",
            f"dataset.cache_dir={demo_cache}",
        ]
        cfg = configure("train", *quick, f"output_dir={folder}", *overrides)
        return train.train(cfg, folder, given=True), folder

    return go
