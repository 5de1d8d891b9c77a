"""Cached latents -> adapter: python train.py dataset.dir=/music/mine model=turbo adapter=lora trainer.max_epochs=800"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from acestep_lora import cli
from acestep_lora.interrupts import raising


@dataclass
class Result:
    """What a run left: the value of `metric`, how many songs were left out, where the adapter is and how to use it."""

    metric: float | None
    left_out: int
    message: str


def train(cfg: DictConfig, folder: Path, given: bool = True, callbacks: Sequence = ()) -> Result:
    """Preprocess what is missing, train, validate, export.

    given: whether the user chose the folder; callbacks: of Lightning's, besides the run's own.
    """
    import lightning as L
    from hydra.utils import instantiate

    from acestep_lora import identity, loggers, plan, report, reports, runs
    from acestep_lora.hashes import FileHashes
    from acestep_lora.processes import is_first

    run = runs.open_run(folder, cfg.name, cfg.resume, cfg.overwrite, given)
    with runs.occupied(run), raising("stopped; nothing is lost, and the same command goes on."):
        L.seed_everything(cfg.seed, workers=True, verbose=False)
        hardware, base = instantiate(cfg.hardware), runs.find_base(cfg.model)
        drawn = {"timesteps": instantiate(cfg.timesteps), "accumulate": cfg.trainer.accumulate_grad_batches}
        data = runs.songs(cfg, base, hardware, **drawn, prior_prompts=runs.prior_prompts(cfg))
        length = runs.plan_length(cfg, len(data.scan.tracks), hardware.processes)
        if runs.finished(cfg, run, length):
            return Result(None, 0, runs.told_finished(run))
        module = plan.make_module(cfg, base, hardware, data.scan.tracks)  # first: a job that cannot fit ends here
        runs.save_config(cfg, run.folder)
        hashes = FileHashes()
        metadata = runs.adapter_metadata(cfg, base.dit_hash(hashes), data.scan.tracks)
        hashes.save()
        base_hash, precision = metadata["base_model_sha256"], hardware.resolved_precision()
        described = identity.of(cfg, base_hash, precision, hardware.processes)
        kept = runs.callbacks(cfg, run, metadata, described, length, base, hardware)
        trainer = runs.trainer(cfg, run, length, hardware, [*kept.values(), *callbacks])
        trainer.fit(module, data, ckpt_path=run.checkpoint, weights_only=True)
        if is_first():
            reports.print_table(data)
            data.write_json(run.folder / "dataset.json", cfg.name)
            loggers.upload(trainer.loggers, run.folder, cfg.name)
        metric = trainer.callback_metrics.get(cfg.metric)
        metric = None if metric is None else float(metric)
        module.dit = None
        del module, trainer
        gc.collect()
        if not is_first():
            return Result(metric, 0, "")
        if cfg.sample:
            reports.samples(cfg, run.folder, base, hardware, data)
        if cfg.training_report:
            report.write(run.folder)  # with the samples
        message = f"{kept['checkpoints'].verdict()}\n{reports.usage(cfg, run.folder)}"
        return Result(metric, len(data.bad), message)


def main(cfg: DictConfig) -> float | int | None:
    result = train(cfg, *cli.output_dir(cfg))
    if result.message:
        print(result.message)
    if cli.is_sweep():
        return result.metric
    return cli.LEFT_OUT if result.left_out else 0


if __name__ == "__main__":
    cli.main("train", main)
