"""Hearing a training while it runs: the same words and seeds every few epochs, beside the base model."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import psutil
import soundfile
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig
from torch import Tensor

from acestep_lora import adapters, basemodel, generation, pages, pictures
from acestep_lora.callbacks.ema import AdapterEMA
from acestep_lora.errors import UserError
from acestep_lora.generation import Request
from acestep_lora.pages import Card, Section

log = logging.getLogger(__name__)

SONGS = 2
"""Held-out songs whose words are used when no prompts are given."""
BASE = "base model"


class Previews(L.Callback):
    """Writes `samples/previews/<epoch>/<prompt>-seed_<seed>.wav`, a picture of each beside the base model, and
    `samples/index.html`. Epochs are named as those of checkpoints.

    The encoders are gone before the transformer is loaded. What holds training up is the sampling; decoding and
    drawing go on beside it where there is memory for both, else they hold it up as well, and where there is not even
    memory for that, previews are left out with the reason.

    Args:
        model: config of the base model, with its sampling settings.
        every_n_epochs: 0 makes none.
        prompts: texts or {prompt, lyrics, bpm, ...} as in generation.Request; None: the words of held-out songs.
        duration: seconds; share: of the time since the start that previews may have taken when another one is due.
    """

    def __init__(
        self,
        output_dir: Path,
        base: basemodel.BaseModel,
        model: DictConfig,
        dtype: torch.dtype,
        every_n_epochs: int,
        prompts: Sequence[str | dict] | None = None,
        seeds: Sequence[int] = (42,),
        duration: float = 10.0,
        share: float = 0.1,
    ) -> None:
        if not 0 < share <= 1:
            raise UserError(f"previews.share must be above 0 and at most 1, got {share}.")
        self.folder, self.base, self.model, self.dtype = Path(output_dir) / "samples", base, model, dtype
        self.every, self.seeds = every_n_epochs, list(seeds)
        self.prompts = [prompts] if isinstance(prompts, str) else prompts
        self.duration, self.share = duration, share
        self.requests: list[Request] = []
        self.pipeline, self.worker, self.pending = None, None, None
        self.made, self.seconds, self.skipped = 0, 0.0, ""

    # ------------------------------------------------------------ before

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not self.every or not trainer.is_global_zero or stage != "fit" or pl_module.adapter.config is None:
            return
        if isinstance(trainer.strategy, ModelParallelStrategy):
            return self._leave_out("the transformer is dealt out to several devices")
        self.requests = self._requests(trainer.datamodule)
        device, token = trainer.strategy.root_device, self.model.timbre_token
        self.make = generation.remember(self.base, self.requests, self.dtype, device, token)

    def _requests(self, data) -> list[Request]:
        seeds = self.seeds
        if self.prompts is None:
            songs = [song.track for song in data.val_set.songs[:SONGS]]
            return [Request.like(track, self.model, self.duration, seeds) for track in songs]
        settings = {name: self.model[name] for name in ("steps", "shift", "guidance_scale")}
        settings |= {"duration": self.duration, "seeds": seeds}
        try:
            told = [{"prompt": prompt} if isinstance(prompt, str) else dict(prompt) for prompt in self.prompts]
            return [Request(**settings | words) for words in told]
        except (TypeError, ValueError) as error:  # no list, or no words in it
            raise UserError(f"previews.prompts: {error}.") from None

    def _leave_out(self, reason: str) -> None:
        """Once and for all: what lacks now, lacks later."""
        self.requests, self.skipped = [], reason
        log.warning("no previews: %s", reason)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.since = time.monotonic()
        if self.requests:
            self.pipeline = self.make(generation.Sampled(pl_module.dit, trainer.precision_plugin.forward_context))
            self.worker = ThreadPoolExecutor(1, thread_name_prefix="previews")

    # ------------------------------------------------------------ every few epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.requests or (trainer.current_epoch + 1) % self.every:
            return
        if self.made and self.seconds > self.share * (time.monotonic() - self.since):
            log.info(
                "epoch %d: no preview, they have taken more than %.0f %% of the time",
                trainer.current_epoch,
                100 * self.share,
            )
            return
        device = pl_module.device
        needed, free, spare = self.needed(), free_memory(device), spare_memory(device)
        if needed > free:
            return self._leave_out(f"they need {needed / 2**30:.2f} GiB (predicted) and {free / 2**30:.2f} are free")
        start = time.monotonic()
        self._collect()
        latents = self.sample(trainer, pl_module)
        task = (latents, trainer.current_epoch, trainer.loggers, device)
        self.pending = self.worker.submit(self.write, *task)
        if needed > spare:
            self._collect()
        self.made, self.seconds = self.made + 1, self.seconds + time.monotonic() - start
        pl_module.log("perf/preview_seconds", self.seconds / self.made)

    @property
    def clips(self) -> list[tuple[int, int]]:
        """(request, seed) of every clip."""
        return [(i, seed) for i, request in enumerate(self.requests) for seed in request.seeds]

    def file(self, column: str, clip: tuple[int, int]) -> Path:
        return self.folder / "previews" / column / f"{clip[0] + 1}-seed_{clip[1]}.wav"

    def sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, list[Tensor]]:
        """Latents [t, c] of every clip with the adapter, averaged where EMA is on, and the first time without it."""
        dit = pl_module.dit
        ema = next((callback for callback in trainer.callbacks if isinstance(callback, AdapterEMA)), None)
        training = dit.training
        dit.eval()
        self.pipeline.condition_encoder.to(pl_module.device)
        try:
            with ema.applied(pl_module) if ema else nullcontext():
                latents = {"adapter": self._latents()}
            if not all(self.file(BASE, clip).is_file() for clip in self.clips):
                with adapters.disabled(dit):
                    latents[BASE] = self._latents()
        finally:
            dit.train(training)
        return latents

    def _latents(self) -> list[Tensor]:
        made = []
        for i, request in enumerate(self.requests):
            self.pipeline.condition_encoder.current = i
            made += generation.generate(self.pipeline, request, output="latent")
        return made

    # ------------------------------------------------------------ beside training, where memory allows

    def write(self, latents: dict[str, list[Tensor]], epoch: int, loggers: list, device: torch.device) -> None:
        """Decode, write and draw the clips of an epoch, and the index."""
        rate, column = self.pipeline.sample_rate, f"epoch_{epoch:04d}"
        names = {BASE: BASE, "adapter": column}
        try:
            self.pipeline.vae.to(device)
            for which in (BASE, "adapter"):
                for clip, rows in zip(self.clips, latents.get(which, ()), strict=False):
                    generation.write_audio(self.file(names[which], clip), generation.decode(self.pipeline, rows), rate)
            self.pipeline.vae.cpu()
            for clip in self.clips:
                self._compare(clip, column, rate, loggers)
            self.write_index()
        except (torch.OutOfMemoryError, OSError) as error:
            log.warning("epoch %d: no preview (%s)", epoch, str(error).partition("\n")[0])

    def _compare(self, clip: tuple[int, int], column: str, rate: int, loggers: list) -> None:
        files = {BASE: self.file(BASE, clip), column: self.file(column, clip)}
        audio = {name: torch.from_numpy(soundfile.read(file, dtype="float32")[0].T) for name, file in files.items()}
        picture = generation.write_spectrograms(files[column].with_suffix(".png"), [audio], rate)
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                name = f"previews/{files[column].stem}"
                logger.log_audio(name, [str(file) for file in files.values()], caption=list(files))
                logger.log_image(f"{name}_spectrograms", [str(picture)])

    def write_index(self) -> Path:
        """`samples/index.html`: prompts down, epochs across, a player in every cell."""
        page = self.folder / "index.html"
        columns = [BASE, *sorted(path.name for path in (self.folder / "previews").glob("epoch_*"))]
        grid = {}
        for clip in self.clips:
            heard = {column: self.file(column, clip) for column in columns if self.file(column, clip).is_file()}
            row = {name: Card(name, pages.link(file, page), pictures.draw(file).png) for name, file in heard.items()}
            grid[f"{clip[0] + 1}. {self.requests[clip[0]].prompt} (seed {clip[1]})"] = row
        return pages.write_page(page, "Previews", self.cost(), [Section("Every few epochs", grid=grid)])

    def cost(self) -> dict[str, str]:
        if not self.made:
            return {}
        share = self.seconds / (time.monotonic() - self.since)
        return {
            "a preview holds training up": f"{self.seconds / self.made:.1f} s",
            "of the time so far": f"{share:.1%}",
        }

    def needed(self) -> int:
        """Bytes that decoding a clip takes, the VAE included; predicted."""
        from acestep_lora import plan  # which itself needs `runs`, where callbacks are made

        seconds = max(request.duration for request in self.requests)
        return plan.predict_decode(self.base, seconds, self.dtype)

    def _collect(self) -> None:
        """Wait for the worker; what went wrong in it goes wrong here."""
        if self.pending:
            future: Future = self.pending
            self.pending = None
            future.result()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.worker:
            self._collect()
            self.worker.shutdown()
            self.worker = self.pipeline = None


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken now, between two steps."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def spare_memory(device: torch.device) -> int:
    """Bytes that training leaves free at its fullest moment; on the CPU, where nobody counts, half of what is free."""
    if device.type != "cuda":
        return psutil.virtual_memory().available // 2
    growth = torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)
    return torch.cuda.mem_get_info(device)[0] - growth
