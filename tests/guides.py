"""What README.md and docs/ say: their blocks, spans and commands, and how a command is tried on the nano model."""

import re
import shlex
from pathlib import Path

from omegaconf import OmegaConf

from acestep_lora import cli, sweep

GUIDES = [cli.ROOT / "README.md", *sorted(set((cli.ROOT / "docs").glob("*.md")) - {cli.ROOT / "docs/log.md"})]
SCRIPT = re.compile(r"(?:(?:python|py) |/app/)(?:-m acestep_lora\.(\w+)|(\w+)\.py)(?![\w/])(.*)")
PROGRAM = re.compile(
    r"(?:\S*/)?(python3?|py|pip|hf|git|cd|export|set|docker|ssh|scp|rsync|tmux|srun|sbatch|ray|wandb|apt-get|curl"
    r"|pytest|Set-\S+|\.venv\S+) \S.*"
)
"""A line of a block that is typed into a terminal."""


def text(guide: Path) -> str:
    return guide.read_text(encoding="utf-8").replace("\\\n", " ")


def code_blocks(guide: Path) -> list[str]:
    """Fenced blocks, and indented lines that are no list's."""
    return re.findall(r"^```\w*\n.*?^```$|^ {4}\S[^\n]*$", text(guide), re.DOTALL | re.MULTILINE)


def spans(guide: Path) -> list[str]:
    """What stands between backquotes in the prose and the tables."""
    prose = text(guide)
    for block in code_blocks(guide):
        prose = prose.replace(block, "")
    return re.findall(r"`([^`\n]+)`", prose)


def fenced(guide: Path, *languages: str) -> list[str]:
    """What is inside the fences of these languages."""
    pattern = rf"^```({'|'.join(languages)})\n(.*?)^```$"
    return [body for _, body in re.findall(pattern, text(guide), re.DOTALL | re.MULTILINE)]


def typed(guide: Path) -> list[str]:
    """The lines of a guide's blocks that are meant for a terminal: those of shell fences, and those that look it."""
    lines = [line.strip() for body in fenced(guide, "sh", "bash", "powershell") for line in body.splitlines()]
    lines += [block.strip() for block in code_blocks(guide) if PROGRAM.fullmatch(block.strip())]
    return [line for line in lines if line and not line.startswith("#")]


def commands(texts: list[str]) -> list[tuple[str, list[str]]]:
    """(script or module, its arguments) of every line that runs one of ours."""
    found = [match.groups() for each in texts for match in SCRIPT.finditer(each)]
    return [(module or script, shlex.split(rest, comments=True)) for module, script, rest in found]


def source(name: str) -> Path:
    """The file that `python NAME.py` or `python -m acestep_lora.NAME` runs."""
    package = cli.ROOT / "acestep_lora"
    places = [cli.ROOT / f"{name}.py", package / f"{name}.py", package / name / "__main__.py"]
    return next(place for place in places if place.is_file())


def configured_by(name: str) -> str:
    """The command whose options a script or module takes: plan and bench, for one, take train's."""
    called = re.search(r'cli\.main\(\s*"(\w+)"', source(name).read_text(encoding="utf-8"))
    return called[1]


def composed(name: str, arguments: list[str]) -> list[tuple[str, list[str]]]:
    """The configurations that a command makes: (name, overrides). A search makes its own and train's."""
    if name != "sweep":
        return [(configured_by(name), plain(arguments))]
    own, job = sweep.split(arguments)
    return [("sweep", own), ("train", sweep.Space.read(job, OmegaConf.create()).shared)]


def plain(arguments: list[str]) -> list[str]:
    """Without Hydra's flags; of a sweep, its first job."""
    sweep = "-m" in arguments
    return [word.split(",")[0] if sweep else word for word in arguments if "=" in word]


# ---------------------------------------------------------------- a try on nano

QUICK = {
    "train": ["trainer.max_steps=2", "dataset.crop_seconds=2", "logger=csv", "hardware=cpu"],
    "preprocess": ["hardware=cpu"],
    "generate": ["duration=2", "steps=2", "hardware=cpu"],
    "annotate": ["hardware=cpu"],
    "sensitivity": ["hardware=cpu", "dataset.crop_seconds=2"],
    "evaluate": ["hardware=cpu", "dataset.crop_seconds=2", "repeats=1", "clips=2", "duration=2", "adapter.scale=1"],
    "report": [],
    "sweep": ["trials=2", "trainer.max_steps=2", "dataset.crop_seconds=2", "logger=csv", "hardware=cpu"],
}
"""What makes a try short; a command without an entry that takes train's options has train's."""
ELSEWHERE = re.compile(
    r"(transcriber|captioner|structure)=(?!lrc|none|rule_based)\S+|push|--config-dir|hardware\.(devices|num_nodes)=\S+"
    r"|hardware=(h100x8|slurm)|hydra/launcher=\S+"
)
"""Of commands that cannot be tried here: services, models to be downloaded, the hub, a folder of the reader's, several
devices."""


def on_nano(name: str, arguments: list[str], home: Path) -> list[str]:
    """A documented command's arguments for the nano model, the CPU, and the songs, runs and fine-tune in a folder."""
    run, other = home / "trained", home / "trained_too"
    values = {"model": "nano", "dataset.dir": home / "songs", "tuned": home / "tuned"}
    values |= dict.fromkeys(("adapter.path", "runs", "save"), run)
    words = []
    for word in arguments:
        key, equals, value = word.replace("=/work/", "=").partition("=")
        if equals and key in values:
            value = f"[{run},{other}]" if "," in value and values[key] == run else values[key]
        if key not in ("model.path", "model.parts_path", "hardware"):
            words.append(f"{key}{equals}{value}")
    short = QUICK.get(name, QUICK["train"] if configured_by(name) == "train" else [])
    at = next((words.index(word) for word in ("--against", "--cfg") if word in words), len(words))
    return words[:at] + short + words[at:]
