"""Training recipes on equal compute: python data/compare_recipes.py --held-out FOLDER --out FOLDER [--seeds 3]

Every recipe trains nano on the demo songs, once for each seed, and is measured on other songs of their style (made by
`make_demo.py --more 16 --out FOLDER`), under the conditions of inference, on fixed timesteps and noise. Prints a
table in Markdown. Runs that are there already are not repeated. Further arguments are train.py's, for all.
"""

import argparse
import statistics
import sys
from pathlib import Path

import lightning as L
import torch
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from acestep_lora import cli, evaluate  # noqa: E402
from train import train  # noqa: E402

COMMON = "logger=csv sample=false training_report=false previews.every_n_epochs=0 hardware=cpu overwrite=true"
DEFAULT = "as it comes"
BFLOAT16 = "adapter weights in bfloat16"
RECIPES = {
    DEFAULT: "",
    "conditions as upstream": "conditioning=upstream",
    "timesteps: upstream's eight": "timesteps=discrete",
    "timesteps: uniform": "timesteps=uniform",
    "timesteps: mixture": "timesteps=mixture",
    "timesteps: stratified": "dataset.stratify=true",
    "crops of 4 s, two at a time": "dataset.crop_seconds=4 dataset.batch_size=2 trainer.accumulate_grad_batches=4",
    BFLOAT16: "",
    "dropout 0.1": "adapter.dropout=0.1",
    "feed-forward layers too": "adapter.mlp=true",
    "average of the weights (EMA)": "ema.decay=0.95",
    "dora": "adapter=dora",
    "lokr": "adapter=lokr",
}


class Rounded(L.Callback):
    """Weights kept in bfloat16: what a step adds is lost where it is smaller than half a unit in the last place."""

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        with torch.no_grad():
            for weight in (weight for weight in pl_module.parameters() if weight.requires_grad):
                weight.copy_(weight.bfloat16())


def trained(folder: Path, recipe: str, seed: int, overrides: list[str]) -> Path:
    """The adapter of the last step, which is the same step for all."""
    adapter = folder / "adapter"
    if not adapter.is_dir():
        given = [*COMMON.split(), f"seed={seed}", *RECIPES[recipe].split(), *overrides]
        train(compose("train", given), folder, callbacks=[Rounded()] if recipe == BFLOAT16 else [])
    return adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 1 on")
    parser.add_argument("--only", action="append", choices=RECIPES, help="a recipe; may be given several times")
    options, overrides = parser.parse_known_args()
    recipes = options.only or list(RECIPES)
    cli.register()
    jobs = [(recipe, seed) for recipe in recipes for seed in range(1, options.seeds + 1)]
    with initialize_config_dir(str(cli.CONF), version_base=None):
        paths = [trained((options.out / f"{i:02d}").resolve(), *job, overrides) for i, job in enumerate(jobs)]
        model = [text for text in overrides if text.startswith("model")]
        measured = [f"dataset.dir={options.held_out.resolve()}", "songs=all", "clips=0", "adapter.scale=1", *model]
        listed = ",".join(f"'{path}'" for path in paths)
        _, rows = evaluate.evaluate(compose("evaluate", [f"adapter.path=[{listed}]", *measured, "hardware=cpu"]))
    base, *found = rows
    print(f"| recipe | loss | against nano's {base.loss:.4f} | spread of seeds |\n|---|---|---|---|")
    for recipe in recipes:
        losses = [row.loss for row, (name, _) in zip(found, jobs, strict=True) if name == recipe]
        mean, spread = statistics.fmean(losses), statistics.stdev(losses) if len(losses) > 1 else float("nan")
        print(f"| {recipe} | {mean:.4f} | {100 * (mean / base.loss - 1):+.1f} % | {spread:.4f} |")


if __name__ == "__main__":
    main()
