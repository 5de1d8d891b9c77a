"""A run's folder: where it is, whether it may be used, what it resumes from, how long it goes on."""

import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from acestep_lora import basemodel
from acestep_lora.callbacks.checkpoints import Checkpoints, checkpoint_folders
from acestep_lora.callbacks.ema import AdapterEMA
from acestep_lora.callbacks.last import LastValidation
from acestep_lora.callbacks.previews import Previews
from acestep_lora.callbacks.progress import progress_bar
from acestep_lora.callbacks.reporting import Reporter
from acestep_lora.callbacks.stopping import EarlyStop
from acestep_lora.callbacks.throughput import Throughput
from acestep_lora.data.datamodule import LatentDataModule
from acestep_lora.data.prior import read_prompts
from acestep_lora.errors import DISK, UserError
from acestep_lora.hardware import Hardware
from acestep_lora.hashes import damage, remove_leftovers, write_atomic
from acestep_lora.identity import Identity
from acestep_lora.locks import locked
from acestep_lora.loggers import MetricsCSV
from acestep_lora.processes import is_first

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """An output folder and the checkpoint that training continues from, if any: steps and whole epochs done in it."""

    folder: Path
    checkpoint: Path | None = None
    step: int | None = None
    epochs: int | None = None
    identity: Identity = field(default_factory=dict)


def open_run(folder: Path, name: str, resume: str | None, overwrite: bool, given: bool) -> Run:
    """Decide where a run writes and what it resumes; nothing is changed yet.

    Args:
        folder: the output folder asked for, or a fresh one.
        name: of the run; `resume=auto` looks for its newest run beside `folder` when no output folder was `given`.
        resume: None, "auto", or a checkpoint (its folder or its state.ckpt). A job that Slurm runs again means "auto".

    Of several processes the first decides and writes; the others only need to know the checkpoint.

    Raises:
        UserError: the folder is in use, or the checkpoint cannot be read.
    """
    if name is None:
        raise UserError("name must be a text, got None.")
    if resume is None and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        resume = "auto"
    if resume is None and not is_first():
        return Run(folder)
    if resume is None:
        if not overwrite and _is_used(folder):
            raise UserError(f"{folder} is not empty: resume=auto continues it, overwrite=true starts over.")
        return Run(folder)
    if resume != "auto":
        path = Path(resume).expanduser()
        path = path / "state.ckpt" if path.is_dir() else path
        home = path.resolve().parents[2] if path.name == "state.ckpt" else folder
        try:
            return _read(folder if given else home, path)
        except _Damaged as damaged:
            raise UserError(
                f"resume={resume} is not a readable checkpoint ({damaged}): give a folder from a run's checkpoints/."
            ) from None
    places = [folder] if given else sorted(folder.parent.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for place in places:
        run = _newest(place)
        if run:
            return run
    log.info("resume=auto: no checkpoint of %s found, starting from the beginning", folder if given else name)
    if (folder / "adapter").is_dir():
        raise UserError(f"{folder} has an adapter/ but no checkpoint to go on from: overwrite=true starts over.")
    return Run(folder)


def _is_used(folder: Path) -> bool:
    return folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())


def _newest(folder: Path) -> Run | None:
    """The newest intact checkpoint of a run, None where it never had one."""
    folders, damaged = checkpoint_folders(folder), []
    for checkpoint in reversed(folders):
        try:
            run = _read(folder, checkpoint / "state.ckpt")
        except _Damaged as reason:
            damaged.append(f"{checkpoint} is damaged ({reason})")
            continue
        for text in damaged:
            log.warning("%s; going on from %s instead", text, checkpoint)
        return run
    if damaged:
        raise UserError(f"{damaged[0]}, and so is every other checkpoint there: overwrite=true starts over.")
    return None


class _Damaged(Exception):
    pass


def _read(folder: Path, path: Path) -> Run:
    """What a checkpoint says of itself. Tensors, numbers and strings only: no pickle is executed."""
    if reason := damage(path):
        raise _Damaged(reason)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return Run(folder, path, checkpoint["global_step"], checkpoint["epochs"], checkpoint["identity"])
    except Exception as error:  # noqa: BLE001 - a damaged zip raises whatever its bytes happen to hit
        raise _Damaged(str(error).split("\n")[0] or type(error).__name__) from None


LOCK = ".lock"


@contextmanager
def occupied(run: Run) -> Iterator[None]:
    """The run's folder, made, locked and logged into inside the block; one that starts over is cleared first.

    Raises UserError where it cannot be written, or another process trains there.
    """
    if not is_first():
        yield  # of several processes, one does all this
        return
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / LOCK).touch()
    except OSError as error:
        raise _cannot_write(run.folder, error) from None
    with locked(run.folder / LOCK, f"{run.folder} is in use by another training."), ExitStack() as stack:
        clear(run.folder, run.checkpoint is not None)
        stack.enter_context(_log_to(run.folder))
        if run.checkpoint:
            log.info("resuming %s at step %d, after %d whole epochs", run.checkpoint.parent, run.step, run.epochs)
        try:
            yield
        except OSError as error:
            if error.errno in DISK or str(error.filename or "").startswith(str(run.folder)):
                raise _cannot_write(run.folder, error) from error
            raise


def _cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"Cannot write to {folder} ({error}): make room there, or choose output_dir=...; checkpoints there are whole."
    )


def clear(folder: Path, resumed: bool = False) -> None:
    """Remove what killed processes left in a folder and, unless it is resumed, what an earlier run did; no more."""
    for path in (folder / "checkpoints").glob(".epoch_*"):
        shutil.rmtree(path)
    remove_leftovers(folder)
    if resumed:
        return
    for name in ("checkpoints", "adapter", "adapter_best", "samples"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.csv", "train.log", "config.yaml", "dataset.json", "progress.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def _log_to(folder: Path) -> Iterator[None]:
    """Everything that is logged inside the block, in `train.log` of the run."""
    handler = logging.FileHandler(folder / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("acestep_lora").setLevel(logging.INFO)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def save_config(cfg: DictConfig, folder: Path) -> None:
    if is_first():
        write_atomic(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=False).encode())


def labels(paths: Sequence[str]) -> list[str]:
    """What tells paths apart: their parts without those that all begin or end with."""
    parts = [Path(path).expanduser().resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        twice = next(path for path, part in zip(paths, parts, strict=True) if parts.count(part) > 1)
        raise UserError(f"{twice} is given twice.")
    for end in (0, -1):
        while len(parts) > 1 and len({part[end] for part in parts}) == 1 and min(map(len, parts)) > 1:
            parts = [part[1:] if end == 0 else part[:-1] for part in parts]
    return ["/".join(part[-2:] if len(parts) == 1 else part) for part in parts]


# ---------------------------------------------------------------- how long


def recipe_epochs(tracks: int) -> int:
    """Upstream's recommendation: 800 epochs for up to 20 songs, 500 from about 100, between them in between."""
    share = min(max((tracks - 20) / 80, 0), 1)
    return round(800 - 300 * share)


@dataclass(frozen=True)
class Length:
    """Trainer arguments that depend on the size of the dataset."""

    max_epochs: int
    max_steps: int
    total_steps: int
    check_val_every_n_epoch: int
    save_every_n_epochs: int | None
    log_every_n_steps: int


def plan_length(cfg: DictConfig, tracks: int, processes: int = 1) -> Length:
    """Fill in what the config leaves open: epochs by the recipe, about 40 validations and 10 checkpoints per run."""
    trainer = cfg.trainer
    for name in ("max_epochs", "max_steps", "accumulate_grad_batches"):
        value = trainer[name]
        if (
            value is not None and value < 1 and (value != -1 or name == "accumulate_grad_batches")
        ):  # Lightning's endless
            raise UserError(f"trainer.{name} must be at least 1, got {value}: a run would train nothing.")
    held_out = max(1, round(tracks * cfg.dataset.val_fraction)) if tracks >= 5 and cfg.dataset.val_fraction else 0
    items_per_step = cfg.dataset.batch_size * trainer.accumulate_grad_batches * processes
    steps_per_epoch = math.ceil((tracks - held_out) / items_per_step)
    steps = -1 if trainer.max_steps is None else trainer.max_steps
    epochs = trainer.max_epochs
    if epochs is None:
        epochs = -1 if steps != -1 else cfg.model.max_epochs or recipe_epochs(tracks)
    expected = epochs if steps == -1 else math.ceil(steps / max(1, steps_per_epoch))
    validate = trainer.check_val_every_n_epoch or max(1, expected // 40)
    save = cfg.save_every_n_epochs or (None if cfg.save_every_n_steps else max(1, expected // 10))
    total = steps if steps != -1 else epochs * steps_per_epoch
    return Length(epochs, steps, total, validate, save, trainer.log_every_n_steps or min(10, max(1, total // 20)))


def finished(cfg: DictConfig, run: Run, length: Length) -> bool:
    """Whether the checkpoint is the end of a run of this length, planned or early; a run's last is named after all."""
    if run.step is None:
        return False
    if 0 <= length.max_steps <= run.step or 0 <= length.max_epochs <= run.epochs:
        return True
    early, timer = early_stop(cfg), time_limit(cfg)
    state = torch.load(run.checkpoint, map_location="cpu", weights_only=True, mmap=True)["callbacks"]
    for each in (early, timer):
        if each is not None and each.state_key in state:
            each.load_state_dict(state[each.state_key])
    return (early is not None and early.over) or (timer is not None and timer.time_remaining() <= 0)


def time_limit(cfg: DictConfig) -> Timer | None:
    return None if cfg.trainer.max_time is None else Timer(cfg.trainer.max_time)


def early_stop(cfg: DictConfig) -> EarlyStop | None:
    options = cfg.early_stopping
    return None if options.patience is None and options.target_loss is None else EarlyStop(cfg.metric, **options)


def told_finished(run: Run) -> str:
    longer = "trainer.max_epochs, trainer.max_steps, trainer.max_time or early_stopping.patience"
    message = f"{run.folder} is finished; a larger {longer} extends it."
    if not (run.folder / "adapter").is_dir():
        message += f" Its adapter is {run.checkpoint.parent / 'adapter'}."
    return message


def callbacks(
    cfg: DictConfig,
    run: Run,
    metadata: dict[str, str],
    described: Identity,
    length: Length,
    base: basemodel.BaseModel,
    hardware: Hardware,
) -> dict[str, Callback]:
    """By name, in the order in which Lightning calls them."""
    kept: dict[str, Callback] = {"progress": progress_bar(), "throughput": Throughput()}
    if timer := time_limit(cfg):
        kept["timer"] = timer  # ours, because it must come before those that look at the result
    kept["last"] = LastValidation()
    if cfg.ema.decay is not None:
        kept["ema"] = AdapterEMA(cfg.ema.decay)
    if early := early_stop(cfg):
        kept["early_stop"] = early
    kept["checkpoints"] = Checkpoints(
        run.folder,
        cfg.name,
        metadata,
        described,
        run,
        allow_changes=cfg.allow_changes,
        metric=cfg.metric,
        save_every_n_epochs=length.save_every_n_epochs,
        save_every_n_steps=cfg.save_every_n_steps,
        keep_last=cfg.keep_last,
        keep_best=cfg.keep_best,
        comfyui_dora=cfg.comfyui_dora,
    )
    every = cfg.previews.every_n_epochs
    if every is None:
        every = length.save_every_n_epochs or length.check_val_every_n_epoch
    previews = dict(cfg.previews) | {"every_n_epochs": every}
    kept["previews"] = Previews(run.folder, base, cfg.model, hardware.dtype, **previews)
    if cfg.training_report:  # the last to see a validation: it tells what the others wrote
        kept["report"] = Reporter(run.folder, cfg, hardware, base)
    return kept


def loggers(cfg: DictConfig, run: Run) -> list[Logger]:
    """metrics.csv, and whatever `logger=` names; of several processes, the first one logs."""
    if not is_first():
        return []
    return [MetricsCSV(run.folder, run.step), *(instantiate(node)(save_dir=run.folder) for node in cfg.logger.values())]


def trainer(cfg: DictConfig, run: Run, length: Length, hardware: Hardware, callbacks: list[Callback]) -> L.Trainer:
    """Lightning's, of the config and of what depends on the dataset and the machine."""
    return instantiate(
        cfg.trainer,
        **hardware.trainer_options(shard=True) | {"precision": hardware.resolved_precision()},
        max_epochs=length.max_epochs,
        max_steps=length.max_steps,
        max_time=None,  # a callback's
        check_val_every_n_epoch=length.check_val_every_n_epoch,
        log_every_n_steps=length.log_every_n_steps,
        callbacks=callbacks,
        logger=loggers(cfg, run),
        default_root_dir=str(run.folder),
    )


# ---------------------------------------------------------------- what it says about itself


def adapter_metadata(cfg: DictConfig, base_hash: str, tracks: list) -> dict[str, str]:
    """Header of every exported file: base model, trigger tag, the settings that decide the result, versions.

    No path, no time, no run id: the same training gives the same bytes.
    """
    first = tracks[0] if tracks else None
    tag = first.custom_tag if first else ""
    metadata = {
        "base_model": f"{cfg.model.repo}/{cfg.model.variant}",
        "base_model_sha256": base_hash,
        "trigger_tag": tag,
        "tag_position": first.tag_position if first else None,
        "example_prompt": first.prompt(first.caption) if first else tag,
        "steps": cfg.model.steps,
        "shift": cfg.model.shift,
        "guidance_scale": cfg.model.guidance_scale,
        "tracks": len(tracks),
        "crop_seconds": cfg.dataset.crop_seconds,
        "batch": cfg.dataset.batch_size * cfg.trainer.accumulate_grad_batches,
        "lr": cfg.optimizer.lr,
        "optimizer": cfg.optimizer._target_,
        "scheduler": cfg.scheduler.name,
        "timesteps": cfg.timesteps._target_,
        "preservation": cfg.preservation.weight,
        "condition_dropout": cfg.dataset.condition_dropout,
        "seed": cfg.seed,
        "python": ".".join(map(str, sys.version_info[:2])),
    }
    metadata |= {f"{package}_version": version(package) for package in ("acestep-lora", "torch", "peft", "diffusers")}
    return {key: str(value) for key, value in metadata.items() if value not in (None, "")}


def songs(cfg: DictConfig, base: basemodel.BaseModel, hardware: Hardware, **more) -> LatentDataModule:
    """The songs of a config, scanned and not yet encoded; more: arguments of LatentDataModule."""
    make = instantiate(cfg.dataset, _partial_=True)  # called apart: Hydra would turn dataclasses into config
    return make(
        base=base,
        conditioning=instantiate(cfg.conditioning),
        seed=cfg.seed,
        dtype=hardware.dtype,
        timbre_token=cfg.model.timbre_token,
        **more,
    )


def encoded_songs(cfg: DictConfig, base: basemodel.BaseModel, hardware: Hardware, **more) -> LatentDataModule:
    """Songs to train on, read outside of a Trainer; what the cache lacks is encoded first, on one device."""
    data = songs(cfg, base, hardware, timesteps=instantiate(cfg.timesteps), **more)
    data.encode(**hardware.but(devices=1, num_nodes=1, strategy="auto").trainer_options())
    data.setup("fit")
    return data


def prior_prompts(cfg: DictConfig) -> list[str]:
    """Prompts on which a run keeps to the base model; none without prior preservation."""
    return [] if cfg.preservation.weight is None else read_prompts(cfg.preservation.prompts)


def find_base(model: DictConfig) -> basemodel.BaseModel:
    """The base model of a `model` config; its own numbers replace the planned ones in the config."""
    base = basemodel.find(model.path, variant=model.variant, repo=model.repo, parts_path=model.parts_path)
    base.check()
    model.timestep_mu, model.timestep_sigma = base.timestep_law()
    return base
