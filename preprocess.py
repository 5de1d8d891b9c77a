"""Songs -> cached latents and conditions: python preprocess.py dataset.dir=/music/mine model=turbo"""

from pathlib import Path

from omegaconf import DictConfig

from acestep_lora import cli
from acestep_lora.interrupts import raising


def preprocess(cfg: DictConfig):
    """Scan, encode what the cache lacks, list every song -> LatentDataModule."""
    from hydra.utils import instantiate

    from acestep_lora import reports, runs
    from acestep_lora.processes import is_first

    hardware, base = instantiate(cfg.hardware), runs.find_base(cfg.model)
    data = runs.songs(cfg, base, hardware)
    with raising("stopped; what was encoded is kept, and the same command goes on."):
        data.encode(**hardware.trainer_options())
    if not is_first():
        return data
    print(f"{len(data.songs)} songs in {data.cache.folder}, {data.made} of them made now")
    if cfg.prune:
        removed = data.cache.prune({song.entry.path for song in data.songs})
        print(f"{len(removed)} unused entries removed")
    if cfg.output:
        data.write_json(Path(cfg.output).expanduser())
    reports.print_table(data)
    return data


def main(cfg: DictConfig) -> int:
    return cli.LEFT_OUT if preprocess(cfg).bad else 0


if __name__ == "__main__":
    cli.main("preprocess", main)
