"""Recipes in conf/experiment and in a folder of your own: which there are, and a finished run's settings as a new one.

python -m acestep_lora.presets [--config-dir FOLDER]
python -m acestep_lora.presets save=runs/mine output=FOLDER/experiment/mine.yaml description="dark ambient, 40 songs"
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import yaml
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from acestep_lora import cli
from acestep_lora.errors import UserError
from acestep_lora.hashes import write_atomic

CHOSEN = ("conditioning", "timesteps", "adapter", "scheduler", "optimizer", "trainer")
"""Groups whose option is part of a recipe."""
KEPT = ("model", "hardware", "dataset")
"""Groups that belong to a machine and its songs: what was set in them is kept, the option itself is not."""
PERSONAL = {
    *("name", "output_dir", "resume", "allow_changes", "overwrite", "experiment", "logger"),
    *("dataset.dir", "dataset.json", "dataset.tensors", "dataset.cache_dir", "dataset.custom_tag"),
    *("model.path", "model.parts_path", "model.timestep_mu", "model.timestep_sigma", "model.name", "model.variant"),
    *("model.repo", "hardware.num_workers", "hardware.devices", "hardware.num_nodes", "hardware.vram_gb"),
}
"""Keys that say where and of what, not how, and what is below them. The timesteps' law is the checkpoint's."""


def recipes() -> list[Path]:
    """The YAML files of the experiment group, of `--config-dir` too; the first of a name is the one that is used."""
    found: dict[str, Path] = {}
    for source in GlobalHydra.instance().config_loader().get_sources():
        for file in sorted(Path(source.path).glob("experiment/*.yaml")) if source.scheme() == "file" else []:
            found.setdefault(file.stem, file)
    return list(found.values())


def header(file: Path) -> dict[str, str]:
    """The comment at the head of a recipe: what it is "for", and its paragraphs "when", "why" and "memory"."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines[1 if lines[:1] == ["# @package _global_"] else 0 :]:
        if not line.startswith("#"):
            break
        comment.append(line[1:].strip())
    parts = {"for": ""}
    key = "for"
    for line in comment:
        word, colon, rest = line.partition(": ")
        if colon and word in ("When", "Why", "Memory"):
            key, line = word.lower(), rest
        parts[key] = f"{parts.get(key, '')} {line}".strip()
    return parts


def show(files: Iterable[Path], console: Console) -> None:
    table = Table("experiment=", "for", "when", "memory", show_lines=True)
    for file in files:
        told = header(file)
        table.add_row(file.stem, *(told.get(key, "") for key in ("for", "when", "memory")))
    console.print(table)


# ---------------------------------------------------------------- a run's settings


def flat(node: object, above: str = "") -> dict[str, object]:
    """Leaves of nested mappings by dotted key; interpolations stay as written."""
    if not isinstance(node, dict) or not node:
        return {above: node}
    below = [flat(child, f"{above}.{name}".strip(".")) for name, child in node.items()]
    return {key: leaf for each in below for key, leaf in each.items()}


def recipe_part(cfg: DictConfig) -> dict[str, object]:
    """What of a configuration belongs into a recipe, by dotted key."""
    every = flat(OmegaConf.to_container(cfg, resolve=False))
    return {key: value for key, value in every.items() if not personal(key)}


def personal(key: str) -> bool:
    return any(f"{key}.".startswith(f"{above}.") for above in PERSONAL)


def changes(run: dict[str, object], default: dict[str, object]) -> dict[str, object] | None:
    """What a run sets otherwise; None where it lacks a key, which a recipe cannot take away."""
    if default.keys() - run.keys():
        return None
    return {key: value for key, value in run.items() if key not in default or default[key] != value}


def recipe(run: DictConfig) -> tuple[list[dict[str, str]], dict[str, object]]:
    """-> (the defaults list, the settings by dotted key) that make train.yaml the configuration of a run.

    Of each group the option is taken that leaves least to be set.
    """

    def composed(*overrides: str) -> dict[str, object]:
        return recipe_part(compose("train", list(overrides)))

    def within(settings: dict[str, object], group: str) -> dict[str, object]:
        return {key: value for key, value in settings.items() if key.partition(".")[0] == group}

    wanted = recipe_part(run)
    loader, chosen = GlobalHydra.instance().config_loader(), {}
    usual = composed()
    for group in (*CHOSEN, *KEPT):
        mine = within(wanted, group)
        if changes(mine, within(usual, group)) == {}:
            continue
        options = loader.get_group_options(group)
        found = {option: changes(mine, within(composed(f"{group}={option}"), group)) for option in options}
        found = {option: left for option, left in found.items() if left is not None}
        if not found:
            raise UserError(
                f"{group} of this run is none of {', '.join(options)}: give the --config-dir it was made with."
            )
        chosen[group] = min(found, key=lambda option: (len(found[option]), option))
    left = changes(wanted, composed(*(f"{group}={option}" for group, option in chosen.items())))
    if left is None:
        raise UserError("the run was made by another version of this program: settings it lacks are there now.")
    return [{f"override /{group}": option} for group, option in chosen.items() if group in CHOSEN], left


def nested(settings: dict[str, object]) -> dict:
    made = OmegaConf.create()
    for key, value in settings.items():
        OmegaConf.update(made, key, value, force_add=True)
    return OmegaConf.to_container(made, resolve=False)


def save(folder: Path, output: Path, description: str) -> None:
    """Write what a run sets otherwise than train.yaml as a recipe, without its songs, paths and machine."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"save={folder} is no run: there is no config.yaml in it.")
    if output.suffix != ".yaml" or output.parent.name != "experiment":
        raise UserError(f"output={output} will not be found: it must be FOLDER/experiment/NAME.yaml.")
    run = OmegaConf.load(file)
    defaults, settings = recipe(run)
    parts = [{"defaults": defaults}] * bool(defaults) + [nested(settings)] * bool(settings)
    told = " ".join(description.split()) or f"As the run {run.name}."
    text = f"# @package _global_\n# {told}\n# When: it was made with model={run.model.name}.\n"
    text += "".join(yaml.safe_dump(part, sort_keys=False, allow_unicode=True) for part in parts)
    write_atomic(output, text.encode())
    print(f"{output}\npython train.py --config-dir {output.parent.parent} experiment={output.stem} dataset.dir=...")


def main(cfg: DictConfig) -> int:
    if cfg.save is None:
        show(recipes(), Console(width=None if sys.stdout.isatty() else 140))
    elif cfg.output is None:
        raise UserError("Where to? output=FOLDER/experiment/NAME.yaml says so.")
    else:
        save(Path(cfg.save).expanduser(), Path(cfg.output).expanduser(), cfg.description)
    return 0


if __name__ == "__main__":
    cli.main("presets", main)
