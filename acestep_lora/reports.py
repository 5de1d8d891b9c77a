"""What a command shows at its end: the dataset as a table, samples, and how to use the adapter."""

import logging
import shlex
import sys
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from acestep_lora import generation
from acestep_lora.adapter_files import DIFFUSERS_FILE, LOKR_FILE
from acestep_lora.basemodel import BaseModel
from acestep_lora.data.datamodule import LatentDataModule
from acestep_lora.data.track import Scan, table
from acestep_lora.hardware import Hardware

log = logging.getLogger(__name__)


def print_table(data: LatentDataModule, console: Console | None = None) -> None:
    """Every song with what is known of it, then every file that was left out and why."""
    tracks = [song.track for song in data.songs or []] or data.scan.tracks
    (console or Console(width=None if sys.stdout.isatty() else 160)).print(table(Scan(tracks, data.bad)))
    for track, remarks in data.remarks.items():
        log.info("%s: %s", track, "; ".join(remarks))


def samples(cfg: DictConfig, folder: Path, base: BaseModel, hardware: Hardware, data: LatentDataModule) -> list[Path]:
    """Clips with and without the adapter from the same seeds and a held-out song's own words, in one picture, too."""
    if not (folder / "adapter").is_dir():
        return []  # adapter=none
    seconds = 10.0 if cfg.model.name == "nano" else 30.0
    track = data.val_set.songs[0].track
    request = generation.Request.like(track, cfg.model, seconds, seeds=[cfg.seed, cfg.seed + 1])
    pipeline = generation.load_pipeline(base, hardware.dtype, hardware.device, cfg.model.timbre_token)
    return generation.write(pipeline, request, [str(folder / "adapter")], [1.0], folder / "samples", compare=True)


def usage(cfg: DictConfig, folder: Path) -> str:
    """How to use the adapter of a finished run; the command is quoted for a POSIX shell where it needs to be."""
    adapter, tag = folder / "adapter", cfg.dataset.custom_tag
    if not adapter.is_dir():
        return f"no adapter was trained; the weights are in {folder / 'checkpoints'}"
    command = ["python", "generate.py", f"adapter.path={adapter}", f"prompt={tag}, ..." if tag else "prompt=..."]
    if cfg.model.name != "nano":
        command += [f"model={cfg.model.name}"] + [f"model.path={cfg.model.path}"] * bool(cfg.model.path)
    lines = [f"adapter: {adapter}", f"  try it:       {shlex.join([*command, 'compare=true'])}"]
    lines += [f"  official app: load the folder {adapter} in its LoRA panel"]
    lines += [f"  ComfyUI:      copy {file} to models/loras" for file in adapter.glob("*_comfyui.safetensors")]
    if (adapter / DIFFUSERS_FILE).is_file():
        load = "transformer.load_lora_adapter" if (adapter / LOKR_FILE).is_file() else "load_lora_weights"
        lines += [f'  diffusers:    pipe.{load}("{adapter}", weight_name="{DIFFUSERS_FILE}")']
    return "\n".join(lines)
