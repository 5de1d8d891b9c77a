"""What the commands share: configuration, free-text values, errors in one sentence, exit codes."""

import dataclasses
import logging
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from acestep_lora import limits
from acestep_lora.data.fields import line
from acestep_lora.errors import UserError, unusable
from acestep_lora.filenames import legal
from acestep_lora.interrupts import Interrupted, raising
from acestep_lora.overrides import quote_overrides
from acestep_lora.processes import is_first

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"

PROVIDER_GROUPS = ("tempo_key", "transcriber", "structure", "captioner")
"""What annotates songs, in the order in which annotate.py asks."""

LEFT_OUT = 3
"""Exit code of a command that did its work, but had to leave some songs out."""

_TOP_LEVEL = {
    "train": "dataset model conditioning timesteps adapter optimizer scheduler trainer hardware logger experiment name "
    "output_dir seed resume allow_changes overwrite metric save_every_n_epochs save_every_n_steps keep_last keep_best "
    "sample previews training_report comfyui_dora early_stopping preservation ema sweep module",
    "preprocess": "dataset model conditioning hardware seed prune output",
    "annotate": "dataset model hardware tempo_key transcriber structure captioner policy dry_run report",
    "sweep": "study trials space sampler pruner",
    "studio": "dataset model conditioning hardware tempo_key transcriber structure captioner output host port",
    "generate": "model hardware adapter prompt lyrics duration bpm keyscale timesignature language instrumental "
    "negative_prompt steps shift guidance_scale n seed compare format output_dir",
    "sensitivity": "dataset model conditioning timesteps adapter hardware seed repeats songs budget rank_step rank_max "
    "keep top_k measured against output_dir",
    "report": "runs output",
    "evaluate": "dataset model conditioning hardware adapter songs seed repeats clips duration steps shift "
    "guidance_scale clap output_dir",
    "export": "verb model adapter format output name dtype approximate tolerance max_rank size comfyui_dora tuned repo "
    "private",
    "presets": "save output description",
}


TOLD = (UserError, HydraException, OmegaConfBaseException)
"""Errors that are the user's to mend; every other one is a bug and shows where it happened."""


def register() -> None:
    """Make `${project:...}`, `${filename:...}`, `${product:...}` and the schemas known: a schema lists the top-level
    keys, to tell a misspelt one."""
    OmegaConf.register_new_resolver("project", lambda path: str(ROOT / path), replace=True)
    OmegaConf.register_new_resolver("filename", lambda text: legal(str(text)), replace=True)
    OmegaConf.register_new_resolver("product", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
    store = ConfigStore.instance()
    for command, keys in _TOP_LEVEL.items():
        fields = [(key, Any, dataclasses.field(default=None)) for key in keys.split()]
        store.store(f"{command}_schema", dataclasses.make_dataclass(f"{command}_schema", fields))


def quiet() -> None:
    """Keep the libraries' own chatter out of the way of what a musician needs to read."""
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    lightning = ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.distributed")
    for module in lightning:
        logging.getLogger(f"lightning.{module}").setLevel(logging.ERROR)
    if not is_first():
        logging.getLogger("acestep_lora").setLevel(logging.WARNING)  # the first process tells the rest


def sentence(error: BaseException) -> str:
    """What to tell the user about one of `TOLD`, or of a file: what is wrong, and what there is instead."""
    if place := unusable(error):
        return f"{place} cannot be used ({error.strerror}): make room, or choose another place."
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for cause in chain:
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
            names = sorted(str(name) for name in cause.parent_node if not str(name).startswith(("_", "hydra")))
            place = cause.full_key.rpartition(".")[0] or "the configuration"
            return f"there is no {cause.full_key}; {place} has {', '.join(names)}."
        if isinstance(cause, MissingConfigException) and cause.options:
            group, _, option = cause.missing_cfg_file.rpartition("/")
            return f"{group}={option} is not one of {', '.join(cause.options)}."
        if isinstance(cause, OverrideParseException):
            return f"{cause.override} cannot be understood ({str(cause).splitlines()[0]})."
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            return f"{cause.name} is not installed: pip install {cause.name}."
        if isinstance(cause, ValueError):  # UserError is one, and so are the complaints of dataclasses
            return str(cause).partition("\n")[0]
    text = " ".join(str(error).split("\n")[:2])
    if "hydra_plugins." in text:
        text += ' The launchers come with pip install "acestep-lora[cluster]".'
    if re.search(r"No match in the defaults list|not in '\w+_schema'", text):
        text += f" It is none of {', '.join(sorted(path.name for path in CONF.iterdir() if path.is_dir()))}."
    return text


def provider_files(groups: tuple[str, ...] = PROVIDER_GROUPS) -> list[Path]:
    """The YAML file of every provider that can be chosen."""
    return [file for group in groups for file in sorted((CONF / group).glob("*.yaml")) if file.stem != "none"]


def as_list(value) -> list:
    """What may be one or several, of a config: null is none."""
    return list(value) if isinstance(value, ListConfig | list) else [] if value is None else [value]


def is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def sweep_name() -> str | None:
    """Of the folder that the jobs of this sweep are numbered in."""
    return Path(HydraConfig.get().sweep.dir).name if is_sweep() else None


def preprocess_command() -> str:
    """What encodes the songs of this training: its choices of the groups that both commands have, and their values."""
    if not HydraConfig.initialized():
        return "python preprocess.py"
    groups, config = ("dataset", "model", "conditioning", "hardware"), HydraConfig.get()
    typed = [text for text in config.overrides.task if text.partition(".")[0] in groups]
    return shlex.join(["python", "preprocess.py", *(f"{g}={config.runtime.choices[g]}" for g in groups), *typed])


def check_launcher(cfg: DictConfig) -> None:
    """Raises UserError for jobs of a sweep on several devices each, unless Slurm is there to start their processes."""
    config = HydraConfig.get()
    if config.mode != RunMode.MULTIRUN or config.launcher._target_.endswith(".SlurmLauncher"):
        return
    for key in ("devices", "num_nodes"):
        if (value := cfg.hardware[key]) != 1:
            raise UserError(
                f"hardware.{key}={value} cannot be swept here, where each job is one process: add "
                "hydra/launcher=submitit_slurm on a Slurm cluster, or start the runs one by one without -m."
            )


def main(command: str, run: Callable[[DictConfig], Any]) -> None:
    """Compose `conf/<command>.yaml` with the command line and call `run`.

    What `run` returns is the exit code of a single run, and the objective of a sweep's job.
    """
    register()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # Windows pipes know no emoji, and a song's name may hold one
    sys.argv[1:] = quote_overrides(sys.argv[1:])
    trace, os.environ["HYDRA_FULL_ERROR"] = os.environ.get("HYDRA_FULL_ERROR") == "1", "1"  # Hydra raises, we tell
    codes, told = [], set()

    def tell(error: Exception) -> None:
        if trace:
            raise error
        text = f"error: {line(sentence(error))}"  # without the terminal codes that a file's name may hold
        if text not in told:  # the jobs of a sweep may all have the same trouble
            print(text, file=sys.stderr)
        told.add(text)
        codes.append(1)

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=command)
    def entry(cfg: DictConfig) -> Any:
        register()  # a launcher may have sent this job to another process
        quiet()
        try:
            limits.check(cfg)
            if "hardware" in cfg:
                check_launcher(cfg)
            value = run(cfg)
        except Exception as error:  # noqa: BLE001 - whatever ends one job of a sweep, the others are run
            if isinstance(error, TOLD) or unusable(error):
                tell(error)
            elif is_sweep():
                log.exception("job %s failed", HydraConfig.get().job.num)
                codes.append(1)
            else:
                raise
            return math.nan
        if not is_sweep() and is_first():  # the first of several processes judges; the others' codes would kill it
            codes.append(value)
        return value

    try:
        with raising("stopped."):
            entry()
    except TOLD as error:
        tell(error)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        codes.append(stopped.code)
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        codes.append(128 + signal.SIGINT)
    raise SystemExit(max(codes, default=0))


def output_dir(cfg: DictConfig) -> tuple[Path, bool]:
    """Where this run writes, and whether the user chose it. A sweep's jobs write to its numbered folders."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    given = any(text.startswith("output_dir=") for text in overrides)
    if not is_sweep():
        return Path(cfg.output_dir).expanduser(), given
    if given:
        raise UserError("output_dir is one run's; the jobs of a sweep are numbered in hydra.sweep.dir=FOLDER.")
    return Path(HydraConfig.get().runtime.output_dir), True
