"""The report of a run, written anew while it goes on."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import lightning as L
import psutil
import torch
from omegaconf import DictConfig

from acestep_lora.basemodel import BaseModel
from acestep_lora.hardware import Hardware
from acestep_lora.hashes import write_atomic


class Reporter(L.Callback):
    """Writes `progress.json`, what only the running process knows, and `report.html` from all that the folder says: at
    validations, where the last time was `report.REFRESH` seconds ago, and at the end."""

    def __init__(self, folder: Path, cfg: DictConfig, hardware: Hardware, base: BaseModel) -> None:
        self.folder, self.cfg, self.hardware, self.base = folder, cfg, hardware, base
        self.predicted: dict[str, int] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from acestep_lora import plan  # which itself needs `runs`, where callbacks are made

        self.since, self.due, self.first = time.monotonic(), 0.0, trainer.global_step
        if trainer.is_global_zero:
            longest = max(song.track.duration for song in trainer.datamodule.songs)
            job = plan.job_of(self.cfg, self.hardware, self.base, longest)
            self.predicted = asdict(plan.predict(job.but(recompute=pl_module.recompute)))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and time.monotonic() >= self.due:
            self.write(trainer, pl_module, done=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(trainer, pl_module, done=True)

    def write(self, trainer: L.Trainer, pl_module: L.LightningModule, done: bool) -> None:
        if not trainer.is_global_zero:
            return
        from acestep_lora import report

        data, device = trainer.datamodule, pl_module.device
        held_out = [] if data.val_set.songs is data.train_set.songs else [s.track.id for s in data.val_set.songs]
        seconds, steps = time.monotonic() - self.since, trainer.global_step - self.first
        total = pl_module.total_steps()
        told = {
            "done": done,
            "step": trainer.global_step,
            "total_steps": total,
            "epoch": trainer.current_epoch,
            "seconds": seconds,
            "eta_seconds": seconds / max(1, steps) * max(0, total - trainer.global_step),
            "songs": len(data.songs),
            "with_caption": sum(song.track.has_caption for song in data.songs),
            "with_lyrics": sum(not song.track.is_instrumental for song in data.songs),
            "held_out": len(held_out),
            "held_out_songs": held_out,
            "song_seconds": sum(song.track.duration for song in data.songs),
            "memory": {"predicted": self.predicted, "measured": measured(device), "device": device.type},
        }
        write_atomic(self.folder / "progress.json", json.dumps(told, indent=2, ensure_ascii=False).encode())
        report.write(self.folder)
        self.due = time.monotonic() + report.REFRESH


def measured(device: torch.device) -> int:
    """Bytes at the fullest moment so far: of a GPU's allocator; on the CPU what the process holds now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
