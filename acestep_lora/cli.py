"""What the commands share: configuration, free-text values, errors in one sentence, exit codes."""

import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf

from acestep_lora.errors import UserError
from acestep_lora.overrides import quote_overrides

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"

LEFT_OUT = 3
"""Exit code of a command that did its work, but had to leave some songs out."""

_TOP_LEVEL = {
    "train": "dataset model conditioning timesteps adapter optimizer scheduler trainer hardware logger experiment name "
    "output_dir seed resume overwrite metric save_every_n_epochs save_every_n_steps keep_last keep_best sample "
    "comfyui_dora ema module",
    "preprocess": "dataset model conditioning hardware experiment seed prune output",
    "generate": "model hardware adapter prompt lyrics duration bpm keyscale timesignature language instrumental "
    "negative_prompt steps shift guidance_scale n seed compare format output_dir",
    "export": "model adapter format output name approximate tolerance max_rank comfyui_dora",
}


def register() -> None:
    """Make `${project:...}` and the schemas known; a schema lists the top-level keys: a misspelt one is an error."""
    OmegaConf.register_new_resolver("project", lambda path: str(ROOT / path), replace=True)
    store = ConfigStore.instance()
    for command, keys in _TOP_LEVEL.items():
        fields = [(key, Any, dataclasses.field(default=MISSING)) for key in keys.split()]
        store.store(f"{command}_schema", dataclasses.make_dataclass(f"{command}_schema", fields))


def quiet() -> None:
    """Keep the libraries' own chatter out of the way of what a musician needs to read."""
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def sentence(error: BaseException) -> str:
    """What to tell the user: the UserError behind whatever Hydra wrapped around it, else the error's first line."""
    cause = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    return str(cause) if cause else " ".join(str(error).split("\n")[:2])


def is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def main(command: str, run: Callable[[DictConfig], Any]) -> None:
    """Compose `conf/<command>.yaml` with the command line and call `run`.

    What `run` returns is the exit code of a single run, and the objective of a sweep's job.
    """
    register()
    sys.argv[1:] = quote_overrides(sys.argv[1:])
    codes = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=command)
    def entry(cfg: DictConfig) -> Any:
        quiet()
        if is_sweep():
            return run(cfg)
        try:
            codes.append(run(cfg))
        except (UserError, InstantiationException) as error:
            print(f"error: {sentence(error)}", file=sys.stderr)
            codes.append(1)

    entry()
    raise SystemExit(max(codes, default=0))


def output_dir(cfg: DictConfig) -> tuple[Path, bool]:
    """Where this run writes, and whether the user chose it. A sweep's jobs write to its numbered folders."""
    if is_sweep():
        return Path(HydraConfig.get().runtime.output_dir), True
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return Path(cfg.output_dir).expanduser(), any(text.startswith("output_dir=") for text in overrides)
