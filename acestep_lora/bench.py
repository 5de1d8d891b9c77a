"""How fast a job trains here, and how close that is to the least there can be: python -m acestep_lora.bench [overrides]

    python -m acestep_lora.bench model=mid dataset.crop_seconds=240 hardware=cpu --against experiment=official

Overrides are train.py's. Those after `--against` make a second job, whose steps are run in turn with the first one's:
their ratio holds when the machine's speed drifts. Weights and songs are random: only their sizes matter.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning as L
import psutil
import torch
import torch.nn.functional as F
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.profilers import SimpleProfiler
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from acestep_lora import plan, runs
from acestep_lora.callbacks.throughput import Throughput
from acestep_lora.data.cache import Cache
from acestep_lora.data.datamodule import ResumableLoader
from acestep_lora.data.draws import EpochOrder
from acestep_lora.data.items import Song, TrainSongs, collate
from acestep_lora.data.track import Track
from acestep_lora.hashes import write_atomic
from acestep_lora.job import Job, Step
from acestep_lora.loggers import MetricsCSV

PAIRS = 5
"""Steps that are timed of each job, after one that is not."""


@dataclass(frozen=True)
class Timing:
    """Medians of one job's steps; seconds, FLOPs per second, bytes."""

    step: float
    frames_per_second: float
    flops: int
    minimum: dict[str, int]
    matmul_rate: float
    peak_predicted: int
    peak_measured: int

    @property
    def of_matmul_rate(self) -> float:
        """Step time over the time that the counted FLOPs take at the measured rate of matrix products."""
        return self.step / (self.flops / self.matmul_rate)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def matmul_rate(job: Job, device: torch.device) -> float:
    """FLOPs per second of the job's frozen products alone: those of its layers, forward and for their input's gradient.

    Each has operands of its own, as in a step: a product that finds them in the cache is none of its.
    """
    patches = job.cfg.dataset.batch_size * math.ceil(job.frames / job.shape["patch_size"])
    hidden, wide, head = job.shape["hidden_size"], job.shape["intermediate_size"], job.shape["head_dim"]
    queries, keys = job.shape["num_attention_heads"] * head, job.shape["num_key_value_heads"] * head
    layer = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden), (hidden, queries), (queries, hidden)]
    layer += [(hidden, wide), (hidden, wide), (wide, hidden)]
    like = {"device": device, "dtype": job.hardware.compute_dtype}
    weights = [torch.randn(out, into, **like) for _ in range(job.depth) for into, out in layer]
    states = {into: torch.randn(patches, into, **like) for into, _ in layer}

    def run() -> None:
        for weight in weights:
            F.linear(states[weight.shape[1]], weight) @ weight

    flops = 4 * patches * sum(weight.numel() for weight in weights)
    return flops / seconds(run, device)


def peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes at the fullest moment of `run`, as the allocator tells: on the CPU through torch's profiler."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def peak_of(job: Job, device: torch.device) -> int:
    """Bytes at the fullest moment of two real steps."""

    def steps() -> None:
        step = Step(job, job.module("cpu").to(device))
        step.run(), step.run()

    return peak(steps, device)


def compare(jobs: list[Job], device: torch.device) -> list[Timing]:
    """Time the jobs' steps in turn."""
    steps = [Step(job, job.module("cpu").to(device)) for job in jobs]
    for step in steps:
        step.micro_batches = 1
        step.run()
    rates, times = [[] for _ in jobs], [[] for _ in jobs]
    for _ in range(PAIRS):
        for i, step in enumerate(steps):
            times[i].append(seconds(step.run, device))
            rates[i].append(matmul_rate(jobs[i], device))
    del steps
    timings = []
    for i, job in enumerate(jobs):
        flops, minimum = plan.count_flops(job)
        step = statistics.median(times[i])
        frames = job.cfg.dataset.batch_size * job.frames / step
        predicted = plan.predict(job).peak
        rate = statistics.median(rates[i])
        timings.append(Timing(step, frames, flops, minimum, rate, predicted, peak_of(job, device)))
    return timings


# ---------------------------------------------------------------- the loop around the step


class Clock(L.Callback):
    """When each step of a training loop ended, on `time.perf_counter`."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) == 1:
            self.first = time.time() - psutil.Process().create_time()


class RandomSongs(L.LightningDataModule):
    """Songs of the job's length, cached as real ones are, read and batched by the same code."""

    def __init__(self, job: Job, folder: Path, count: int) -> None:
        super().__init__()
        self.job, cache = job, Cache(folder)
        width, channels = job.condition_width, job.shape["audio_acoustic_hidden_dim"]
        header = {"audio_key": "", "text_key": "", "duration": repr(job.frames / job.rate), "frames": str(job.frames)}
        self.songs = []
        for i in range(count):
            tensors = {
                "latents.mean": torch.randn(job.frames, channels),
                "latents.std": torch.rand(job.frames, channels),
            }
            tensors["condition.caption"] = torch.randn(job.tokens, width, dtype=job.hardware.dtype)
            entry = cache.write(folder / f"{i}.safetensors", tensors, header)
            self.songs.append(Song(Track(id=str(i), path=Path(str(i))), entry))

    def train_dataloader(self) -> ResumableLoader:
        cfg = self.job.cfg
        songs = TrainSongs(self.songs, cfg.seed, None, instantiate(cfg.timesteps), False, 0.0, 0, 0.0)
        order = EpochOrder(songs, cfg.dataset.batch_size, accumulate=1)
        return ResumableLoader(songs, batch_sampler=order, collate_fn=collate, num_workers=cfg.dataset.num_workers)


def loop(job: Job, steps: int = 4) -> dict[str, float]:
    """Run Lightning's loop over random songs, a batch a step -> where time goes besides the step itself.

    Shares are of all steps but the first; the seconds are from the start of the process to the end of the first.
    """
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        profiler = SimpleProfiler(dirpath=folder, filename="profile")
        trainer = L.Trainer(
            **job.hardware.trainer_options(),
            precision=job.hardware.resolved_precision(),
            max_epochs=1,
            callbacks=[clock, Throughput()],
            logger=MetricsCSV(Path(folder), None),
            log_every_n_steps=2,
            profiler=profiler,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
        )
        trainer.fit(job.module("cpu"), RandomSongs(job, Path(folder), steps * job.cfg.dataset.batch_size))

    def spent(action: str) -> float:
        return sum(sum(times[1:steps]) for name, times in profiler.recorded_durations.items() if name.endswith(action))

    total = clock.ends[-1] - clock.ends[0]
    loader, step = spent("train_dataloader_next"), spent("FlowModule.optimizer_step")
    return {
        "loader_share": loader / total,
        "share_around_the_step": (total - loader - step) / total,
        "seconds_to_first_step": clock.first,
    }


# ---------------------------------------------------------------- the command


def show(names: list[str], timings: list[Timing], loops: list[dict[str, float]], console: Console) -> None:
    table = Table("", *names)
    rows = {
        "step, s": lambda t: f"{t.step:.3f}",
        "latents per s": lambda t: f"{t.frames_per_second:.0f}",
        "FLOPs of a micro-batch": lambda t: f"{t.flops:.4g}",
        "x the least possible": lambda t: f"{t.flops / sum(t.minimum.values()):.3f}",
        "rate of products, FLOP/s": lambda t: f"{t.matmul_rate:.3g}",
        "step / (FLOPs / rate)": lambda t: f"{t.of_matmul_rate:.2f}",
        "peak memory predicted, MiB": lambda t: f"{t.peak_predicted / 2**20:.1f}",
        "peak memory measured, MiB": lambda t: f"{t.peak_measured / 2**20:.1f}",
    }
    for label, cell in rows.items():
        table.add_row(label, *(cell(timing) for timing in timings))
    for key in loops[0]:
        table.add_row(key.replace("_", " "), *(f"{each[key]:.4f}" for each in loops))
    console.print(table)
    console.print("The least possible:", {name: f"{value:.3g}" for name, value in timings[0].minimum.items()})
    if len(timings) == 2:
        first, second = timings
        console.print(f"second / first: time {second.step / first.step:.3f}, FLOPs {second.flops / first.flops:.3f}")


def bench(configs: list[DictConfig], output: Path | None = None) -> list[Timing]:
    """Measure one job, or two in turn; print a table, and write it as JSON where `output` says."""
    jobs = []
    for cfg in configs:
        hardware = instantiate(cfg.hardware)
        job = plan.job_of(cfg, hardware, runs.find_base(cfg.model) if cfg.model.path else None)
        jobs.append(job.but(recompute=plan.choose(job)))
    loops = [loop(job) for job in jobs]
    timings = compare(jobs, torch.device(jobs[0].hardware.device))
    names = ["first", "second"][: len(jobs)]
    show(names, timings, loops, Console(width=120))
    if output is not None:
        results = [asdict(timing) | shares for timing, shares in zip(timings, loops, strict=True)]
        write_atomic(output, json.dumps(dict(zip(names, results, strict=True)), indent=2).encode())
    return timings


if __name__ == "__main__":
    from acestep_lora import cli

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as of train.py")
    parser.add_argument(
        "--against", nargs="+", metavar="OVERRIDE", help="a second job: the first one's overrides and these"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    arguments = parser.parse_args()
    sys.argv[1:] = arguments.overrides

    def main(cfg: DictConfig) -> int:
        other = []
        if arguments.against:
            first = list(HydraConfig.get().overrides.task)
            other = [compose("train", first + cli.quote_overrides(arguments.against))]
        bench([cfg, *other], arguments.json)
        return 0

    cli.main("train", main)
