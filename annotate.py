"""Fill in what is missing beside the songs: python annotate.py dataset.dir=/music/mine transcriber=whisper_local"""

import sys
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from acestep_lora import cli
from acestep_lora.errors import UserError


def annotate(cfg: DictConfig):
    """Scan, ask every provider what is missing, list every song -> annotator.Report; None with dry_run."""
    from hydra.utils import instantiate

    from acestep_lora.annotate.annotator import Annotator
    from acestep_lora.data import track

    if cfg.dataset.dir is None:
        raise UserError("dataset.dir is not set: give the folder of songs, dataset.dir=/music/mine.")
    settings = OmegaConf.to_container(cfg, resolve=True)
    dirs, annotator = settings["dataset"]["dir"], Annotator(settings["policy"])
    providers = [instantiate(cfg[group]) for group in cli.PROVIDER_GROUPS if cfg[group]]
    if cfg.dry_run:
        list_calls(annotator.paid_calls(providers, track.scan(dirs)))
        return None
    report = annotator.run(providers, lambda: track.scan(dirs))
    conclude(report.onto(track.scan(dirs)), report, dirs, cfg.report)
    return report


def list_calls(calls: Mapping[str, list]) -> None:
    for name, tracks in calls.items():
        minutes = sum(track.duration for track in tracks) / 60
        print(f"{name}: {len(tracks)} calls, {minutes:.1f} min of music")
        for track in tracks:
            print(f"  {track.id}")
    if not calls:
        print("no provider that costs money is chosen")


def conclude(scan, report, dirs, page: str | None) -> None:
    """The table, what nobody has reviewed, and the page."""
    from rich.console import Console

    from acestep_lora.annotate.annotator import unreviewed
    from acestep_lora.annotate.report import write_report
    from acestep_lora.data.track import table

    Console(width=None if sys.stdout.isatty() else 160).print(table(scan))
    for name, calls in report.asked.items():
        print(f"{name}: asked about {calls} songs, had something to say about {report.filled[name]}")
    if waiting := unreviewed(scan.tracks, "lyrics"):
        print(f"lyrics that nobody has reviewed: {len(waiting)}; check them by ear, transcripts have mistakes")
    if page:
        first = dirs if isinstance(dirs, str) else dirs[0]
        folder = Path(first["dir"] if isinstance(first, Mapping) else first).expanduser()
        print(f"report: {write_report(scan, folder / page)}")


def main(cfg: DictConfig) -> int:
    report = annotate(cfg)
    return cli.LEFT_OUT if report and report.failed else 0


if __name__ == "__main__":
    cli.main("annotate", main)
