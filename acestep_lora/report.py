"""How a run goes, or how several compare: python -m acestep_lora.report runs=[runs/a,runs/b]

A training writes the report of its own, `report.html`, while it runs.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from acestep_lora import cli, pages, pictures, runs
from acestep_lora.annotate.report import clock
from acestep_lora.data.items import VAL_TIMESTEPS
from acestep_lora.errors import UserError
from acestep_lora.pages import Card, Section
from acestep_lora.pictures import Panel
from acestep_lora.verdict import Curves, judge

REFRESH = 30  # seconds, while a run is under way
HEARD = 3  # latest previews on the page; samples/index.html has them all
SMOOTH = 0.9
"""Of the curve so far, in a running mean of the training loss."""
OWN = {"output_dir", "resume", "overwrite", "name"}
"""Settings that say which run it is, not how it is trained."""
MAIN = """model.name adapter.name adapter.r adapter.alpha adapter.mlp adapter.layers optimizer._target_ optimizer.lr
scheduler.name timesteps._target_ dataset.crop_seconds dataset.batch_size trainer.accumulate_grad_batches
dataset.condition_dropout preservation.weight ema.decay model.quantize seed""".split()


@dataclass(frozen=True)
class Record:
    """What a run's folder says: settings by dotted name, rows of metrics.csv, and progress.json."""

    folder: Path
    settings: dict[str, object]
    rows: list[dict[str, float]]
    progress: dict

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric."""
        points = [(int(row["step"]), row[name]) for row in self.rows if name in row]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, name: str) -> float | None:
        values = self.curve(name)[1]
        return values[-1] if values else None

    @property
    def curves(self) -> Curves:
        levels = {kind: {t: self.last(f"val/{kind}_t={t}") for t in VAL_TIMESTEPS} for kind in ("loss", "base_loss")}
        known = {kind: {t: loss for t, loss in found.items() if loss is not None} for kind, found in levels.items()}
        return Curves(
            train=list(zip(*self.curve("train/loss"), strict=True)),
            val=list(zip(*self.curve("val/loss"), strict=True)),
            base=self.last("val/base_loss"),
            last=known["loss"],
            base_last=known["base_loss"],
            held_out=self.progress.get("held_out"),
            seen=list(zip(*self.curve("train/grid_loss"), strict=True)),
            seen_base=self.last("train/grid_base_loss"),
        )


def read(folder: str | Path) -> Record:
    """Raises UserError for a folder that no training wrote."""
    folder = Path(folder).expanduser()
    try:
        settings = OmegaConf.load(folder / "config.yaml")
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = [{name: float(text) for name, text in row.items() if name and text} for row in csv.DictReader(file)]
        told = folder / "progress.json"
        progress = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not the folder of a training: {error}.") from None
    settings.output_dir = str(folder)  # as saved, it asks Hydra for the time
    return Record(folder, flat(OmegaConf.to_container(settings, resolve=True)), rows, progress)


def flat(node: Mapping, above: str = "") -> dict[str, object]:
    """{a: {b: 1}} -> {"a.b": 1}"""
    found = {}
    for name, value in node.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found


def smooth(values: Sequence[float]) -> list[float]:
    """A running mean that forgets."""
    mean, made = None, []
    for value in values:
        mean = value if mean is None else SMOOTH * mean + (1 - SMOOTH) * value
        made.append(mean)
    return made


# ---------------------------------------------------------------- one run


def write(folder: str | Path) -> Path:
    """`report.html` of a run, finished or under way."""
    record = read(folder)
    page, going = record.folder / "report.html", record.progress.get("done") is False
    verdict = judge(record.curves)
    sections = [
        Section("What it says", points=verdict.seen),
        *([Section("What to try next", points=verdict.next)] if verdict.next else []),
        Section("Curves", figures={"loss, gradient norm, learning rate, speed": pictures.draw_curves(panels(record))}),
        *listening(record, page),
        Section("Memory", MEMORY_NOTE, table=memory(record.progress["memory"]))
        if "memory" in record.progress
        else None,
        Section("Songs", table=songs(record.progress)) if "songs" in record.progress else None,
        Section(
            "Settings",
            table=[("setting", "value"), *((name, str(record.settings.get(name))) for name in MAIN)],
            cards=[Card("All of them", texts={"show": "\n".join(f"{k}={v}" for k, v in record.settings.items())})],
        ),
    ]
    title = f"Training of {record.settings['name']}"
    return pages.write_page(page, title, facts(record), [s for s in sections if s], REFRESH if going else None)


def facts(record: Record) -> dict[str, str]:
    progress, curves = record.progress, record.curves
    shown = {}
    if "step" in progress:
        shown["step"] = f"{progress['step']} of {progress['total_steps']}"
        shown["left" if progress["done"] is False else "took"] = clock(
            progress["eta_seconds"] if progress["done"] is False else progress["seconds"]
        )
    if curves.val and curves.base is not None:
        step, best = curves.best
        shown["best on training songs" if curves.held_out == 0 else "best on held-out songs"] = (
            f"{best:.4f} at step {step}"
        )
        shown["against the base model"] = f"{best / curves.base - 1:+.1%}"
        shown["use"] = "adapter_best/" if best < curves.val[-1][1] else "adapter/"
    return shown


def panels(record: Record) -> list[Panel]:
    steps, train = record.curve("train/loss")
    val, base = record.curve("val/loss"), record.last("val/base_loss")
    loss = {"each step": (steps, train), "training": (steps, smooth(train)), "held out": val}
    loss["trained on, measured alike"] = record.curve("train/grid_loss")
    if base is not None:
        loss["base model"] = ([0, max([1, *steps, *val[0]])], [base, base])
    marks = {"best": record.curves.best[0]} if record.curves.val else {}
    shown = [Panel("loss", "step", loss, faint=["each step"], marks=marks)]
    by_time = {"base model": record.curves.base_last, "held out": record.curves.last}
    times = {label: (list(found), list(found.values())) for label, found in by_time.items() if found}
    shown.append(Panel("loss by noise level, at the last validation", "t (1 is pure noise)", times))
    levels = {f"t={t}": record.curve(f"val/loss_t={t}") for t in VAL_TIMESTEPS}
    shown.append(
        Panel("held-out loss by noise level", "step", {name: curve for name, curve in levels.items() if curve[0]})
    )
    for name, metric in {
        "gradient norm": "train/grad_norm",
        "learning rate": "lr",
        "latent frames per second": "perf/frames_per_s",
        "distance from the base model under other prompts": "val/prior_loss",
    }.items():
        shown.append(Panel(name, "step", {name: record.curve(metric)}))
    return [panel for panel in shown if any(steps for steps, _ in panel.curves.values())]


def listening(record: Record, page: Path) -> list[Section]:
    """Samples of the end, and the latest previews."""
    samples, sections = record.folder / "samples", []

    def card(file: Path) -> Card:
        return Card(file.stem, pages.link(file, page), pictures.draw(file).png)

    ends = [file for file in sorted(samples.glob("seed_*.wav")) if not file.stem.endswith("_base")]
    pairs = {file.stem: {"base model": file.with_stem(f"{file.stem}_base"), "adapter": file} for file in ends}
    if pairs:
        grid = {name: {which: card(file) for which, file in pair.items()} for name, pair in pairs.items()}
        sections.append(Section("At the end", "The same seed and words, without and with the adapter.", grid=grid))
    epochs = sorted((samples / "previews").glob("epoch_*"))[-HEARD:]
    if epochs:
        columns = [samples / "previews/base model", *epochs]
        names = sorted({file.name for file in epochs[-1].glob("*.wav")})
        grid = {name: {c.name: card(c / name) for c in columns if (c / name).is_file()} for name in names}
        sections.append(Section("While it trained", "The latest previews; samples/index.html has them all.", grid=grid))
    return sections


MEMORY_NOTE = (
    "Predicted before the start; measured so far. On a GPU both are what its allocator gives out; on a CPU what is "
    "measured is the whole process, with Python and its libraries."
)


def memory(found: dict) -> list[tuple[str, str]]:
    sizes = found["predicted"] | {"together, predicted": sum(found["predicted"].values())}
    sizes |= {f"measured, {found['device']}": found["measured"]}
    return [("part", "MiB"), *((part, f"{size / 2**20:,.0f}") for part, size in sizes.items())]


def songs(progress: dict) -> list[tuple[str, str]]:
    return [
        ("songs", str(progress["songs"])),
        ("with a caption", str(progress["with_caption"])),
        ("with lyrics", str(progress["with_lyrics"])),
        ("held out", ", ".join(progress["held_out_songs"]) or "none"),
        ("together", clock(progress["song_seconds"])),
    ]


# ---------------------------------------------------------------- several runs


def compare(folders: Sequence[str | Path], output: Path) -> Path:
    """A page that lays the curves of several runs over each other and says in which settings they differ."""
    named = dict(zip(runs.labels([str(folder) for folder in folders]), map(read, folders), strict=True))
    shown = []
    for title, metric in {
        "held-out loss": "val/loss",
        "training loss": "train/loss",
        "gradient norm": "train/grad_norm",
        "learning rate": "lr",
    }.items():
        curves = {name: record.curve(metric) for name, record in named.items()}
        if metric == "train/loss":
            curves = {name: (steps, smooth(values)) for name, (steps, values) in curves.items()}
        shown.append(Panel(title, "step", {name: curve for name, curve in curves.items() if curve[0]}))
    sections = [
        Section("Side by side", table=results(named), figures={"curves": pictures.draw_curves(shown)}),
        Section("Settings that differ", table=differences(named)),
        *(Section(name, points=judge(record.curves).seen) for name, record in named.items()),
    ]
    return pages.write_page(output, "Runs compared", {"runs": str(len(named))}, sections)


def results(named: Mapping[str, Record]) -> list[tuple[str, ...]]:
    """Best held-out losses, the lowest first; those of different songs cannot be compared, as their base tells."""
    found = {name: record.curves for name, record in named.items()}
    measured = sorted((name for name in found if found[name].val), key=lambda name: found[name].best[1])
    rows = [
        (
            name,
            f"{found[name].best[1]:.4f}",
            str(found[name].best[0]),
            f"{found[name].base:.4f}" if found[name].base else "",
        )
        for name in measured
    ]
    rows += [(name, "not measured", "", "") for name in found if name not in measured]
    return [("run", "best held-out loss", "at step", "base model"), *rows]


def differences(named: Mapping[str, Record]) -> list[tuple[str, ...]]:
    names = sorted(set().union(*(record.settings for record in named.values())))
    values = {name: [str(record.settings.get(name, "")) for record in named.values()] for name in names}
    apart = {n: own for n, own in values.items() if len(set(own)) > 1 and n.partition(".")[0] not in OWN}
    return [("setting", *named), *((name, *own) for name, own in apart.items())]


def main(cfg: DictConfig) -> int:
    folders = cli.as_list(cfg.runs)
    if len(folders) == 1:
        print(write(folders[0]))
    else:
        print(compare(folders, Path(cfg.output).expanduser()))
    return 0


if __name__ == "__main__":
    cli.main("report", main)
