"""Which modules a dataset pulls at, and the ranks that follow: python -m acestep_lora.sensitivity [overrides]

A module's sensitivity is the mean squared gradient of the flow loss with respect to its frozen weight W [o, i], an
item at a time. With inputs X [n, i] and output gradients G [n, o] that gradient is G' X, and it is never formed: X is
multiplied by random columns S [i, s] as it passes, and E |G' X S|^2 is |G' X|^2 when the columns have variance 1 / s.
G' X S is what a LoRA with these columns for its A would see at its B, so a pass costs about what an epoch costs.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track as progress
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader

from acestep_lora.adapters import Adapter, adaptable
from acestep_lora.data.draws import Draw, cut
from acestep_lora.data.items import Batch, TrainSongs, collate
from acestep_lora.dit import AceStepDiT
from acestep_lora.errors import UserError
from acestep_lora.hardware import Hardware
from acestep_lora.hashes import replacing, write_atomic
from acestep_lora.module import FlowModule
from acestep_lora.naming import NAME, to_diffusers, to_upstream
from acestep_lora.randomness import generator
from acestep_lora.ranks import parse_count, share_out

COLUMNS = 64
"""Of S. A weight with no more inputs than that is measured exactly."""
SCALE = 2.0**12
"""Of the loss, so that gradients do not vanish in float16; a power of two changes nothing in the other formats."""


# ---------------------------------------------------------------- measuring


class _Tell(torch.autograd.Function):
    """The identity; its backward pass tells the squared gradient of each item's weight, one number per item."""

    @staticmethod
    def forward(ctx, out: Tensor, anchor: Tensor, narrow: Tensor, tell: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(narrow)
        ctx.tell = tell
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (narrow,) = ctx.saved_tensors
        ctx.tell(torch.bmm(grad.float().mT, narrow).square().sum((1, 2)))
        return grad, None, None, None


class Probes:
    """Stand where an adapter would: they watch the modules it would change, and change nothing.

    `squares` [modules] sums the squared gradients of all items that passed since `restart`, in the order of `names`.
    """

    dropout = 0.0

    def __init__(self, adapter: Adapter, seed: int, columns: int = COLUMNS) -> None:
        self.adapter, self.seed, self.columns = adapter, seed, columns
        self.config = adapter.config
        self.names: list[str] = []
        self._anchor = torch.zeros((), requires_grad=True)  # lets gradients reach a model of which nothing is trained
        self._drawn: dict[int, Tensor] = {}

    def inject(self, dit: nn.Module) -> None:
        self.names = self.adapter.targets(len(dit.layers))
        self.squares = torch.zeros(len(self.names), device=dit.device)
        for i, name in enumerate(self.names):
            dit.get_submodule(to_diffusers(name)).register_forward_hook(self._hook(i))

    def restart(self) -> None:
        self.squares.zero_()

    def draw(self, key: int) -> None:
        """Take new random columns, a function of (seed, key)."""
        self._drawn.clear()
        self._key = key

    def _hook(self, i: int) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            with torch.no_grad(), torch.autocast(out.device.type, enabled=False):
                narrow = self._narrow(args[0].float())
            return _Tell.apply(out, self._anchor, narrow, lambda squares: self.squares[i].add_(squares.sum()))

        return hook

    def _narrow(self, x: Tensor) -> Tensor:
        """[b, n, i] -> [b, n, s] of the same expected squares, or x itself where that is no wider."""
        width = x.shape[-1]
        if width <= self.columns:
            return x
        if width not in self._drawn:
            columns = torch.randn(width, self.columns, generator=generator(self.seed, "columns", self._key, width))
            self._drawn[width] = columns.to(x.device) / self.columns**0.5
        return x @ self._drawn[width]


@dataclass(frozen=True)
class Sensitivity:
    """What was measured: of module i in pass k, the mean over items of the squared gradient of its whole weight.

    squares [k, modules]; sizes [modules]: elements of each weight.
    """

    modules: list[str]
    squares: np.ndarray
    sizes: np.ndarray

    @property
    def gradient(self) -> np.ndarray:
        """Of whole weights [modules]."""
        return self.squares.mean(0)

    @property
    def scores(self) -> np.ndarray:
        """Mean squared gradient of one element [modules]."""
        return self.gradient / self.sizes

    @property
    def spread(self) -> np.ndarray:
        """Standard deviation over the passes as a share of the mean [modules]; nan of a single pass."""
        if len(self.squares) < 2:
            return np.full(len(self.modules), np.nan)
        return self.squares.std(0, ddof=1) / np.maximum(self.gradient, np.finfo(float).tiny)

    def shares(self, part: Callable[[str], str]) -> dict[str, tuple[float, float]]:
        """Of each group of modules that `part` names: its share of all the gradient, and of all the weights."""
        groups = {}
        for i, name in enumerate(self.modules):
            gradient, size = groups.get(part(name), (0.0, 0.0))
            groups[part(name)] = (
                gradient + self.gradient[i] / self.gradient.sum(),
                size + self.sizes[i] / self.sizes.sum(),
            )
        return groups


def block(name: str) -> str:
    """layers.3.self_attn.q_proj -> layers.3"""
    return ".".join(name.split(".")[:2])


def kind(name: str) -> str:
    """layers.3.self_attn.q_proj -> self_attn.q_proj"""
    return ".".join(name.split(".")[2:])


def passes(songs: TrainSongs, repeats: int, most: int | None, batch_size: int) -> Iterator[list[list[Draw]]]:
    """The batches of each pass: every song once, or `most` of them, their timesteps spread over the distribution."""
    items = [i for i, song in enumerate(songs.songs) for _ in range(song.track.repeat)]
    turns = torch.randperm(len(items), generator=generator(songs.seed, "sensitivity")).tolist()
    chosen = sorted((items[turn] for turn in turns[:most]), key=songs.length)
    for epoch in range(repeats):
        draws = [Draw(song, epoch, slot, slot, len(chosen)) for slot, song in enumerate(chosen)]
        yield cut(draws, batch_size, world=1)


def measure(
    module: FlowModule, songs: TrainSongs, hardware: Hardware, repeats: int, most: int | None, batch_size: int
) -> Sensitivity:
    """Run the songs through a module whose adapter are Probes, forward and backward."""
    probes, squares = module.adapter, []
    songs.stratify = True
    batches = list(passes(songs, repeats, most, batch_size))
    with torch.enable_grad():
        for number, each in enumerate(batches):
            probes.restart()
            loader = DataLoader(songs, batch_sampler=each, collate_fn=collate)
            for batch in progress(loader, f"pass {number + 1} of {repeats}", total=len(each)):
                probes.draw(batch.key)
                _backward(module, batch.to(module.device), hardware)
            items = sum(map(len, each))
            squares.append(probes.squares.double().cpu().numpy() / SCALE**2 / items)
    weights = [module.dit.get_submodule(to_diffusers(name)) for name in probes.names]
    sizes = np.array([layer.in_features * layer.out_features for layer in weights], float)
    return Sensitivity(probes.names, np.stack(squares), sizes)


def _backward(module: FlowModule, batch: Batch, hardware: Hardware) -> None:
    with hardware.autocast(batch.latents.device):
        loss = module.losses(batch).sum()
    (loss * SCALE).backward()


# ---------------------------------------------------------------- ranks


def parameters(cfg: DictConfig, shape: dict, ranks: dict[str, int]) -> dict[str, int]:
    """Trainable parameters of each adapted module at these ranks, counted by PEFT on a model without memory."""
    from hydra.utils import instantiate

    cfg = cfg.copy()
    cfg.adapter.rank_pattern = ranks
    with torch.device("meta"):
        dit = AceStepDiT(**shape).requires_grad_(False)
        instantiate(cfg.adapter).inject(dit)
    counts = {}
    for name, parameter in dit.named_parameters():
        if parameter.requires_grad:
            module = to_upstream(name.partition(f".{NAME}")[0].rpartition(".")[0])
            counts[module] = counts.get(module, 0) + parameter.numel()
    return counts


def costs(cfg: DictConfig, shape: dict, modules: list[str], step: int) -> tuple[dict[str, int], dict[str, int]]:
    """Of each module: parameters of a rank, and those it has anyway. Raises UserError where ranks do not add up."""
    one, two, three = (parameters(cfg, shape, dict.fromkeys(modules, n * step)) for n in (1, 2, 3))
    slope = {name: (two[name] - one[name]) // step for name in modules}
    if any(slope[name] <= 0 or three[name] - two[name] != two[name] - one[name] for name in modules):
        raise UserError(f"adapter={cfg.adapter.name} does not grow rank by rank: use adapter=lora.")
    return slope, {name: one[name] - step * slope[name] for name in modules}


def make_pattern(cfg: DictConfig, shape: dict, found: Sensitivity) -> tuple[dict[str, int], int]:
    """Ranks of the measured modules within `budget`, 0 for those left out -> (ranks, parameters)."""
    slope, fixed = costs(cfg, shape, found.modules, cfg.rank_step)
    flat = sum(slope.values()) * cfg.adapter.r + sum(fixed.values())
    budget = flat if cfg.budget is None else parse_count(cfg.budget)
    gains = dict(zip(found.modules, found.gradient.tolist(), strict=True))
    if cfg.keep is not None:
        gains = dict(sorted(gains.items(), key=lambda item: -item[1] / slope[item[0]])[: cfg.keep])
    ranks = dict.fromkeys(found.modules, 0)
    ranks |= share_out(gains, slope, budget - sum(fixed[name] for name in gains), cfg.rank_step, cfg.rank_max)
    total = sum(parameters(cfg, shape, ranks).values())
    if total > budget:
        raise UserError(f"rank_max={cfg.rank_max} is beyond what adapter={cfg.adapter.name} counts by ranks: lower it.")
    return ranks, total


# ---------------------------------------------------------------- what is told


def write_json(path: Path, found: Sensitivity, ranks: dict[str, int], about: dict) -> None:
    modules = [
        {
            "module": name,
            "sensitivity": found.scores[i],
            "spread": None if np.isnan(found.spread[i]) else found.spread[i],
            "gradient": found.squares[:, i].tolist(),
            "size": int(found.sizes[i]),
            "rank": ranks[name],
        }
        for i, name in enumerate(found.modules)
    ]
    groups = {
        title: {name: {"gradient": g, "weights": w} for name, (g, w) in found.shares(part).items()}
        for title, part in (("blocks", block), ("kinds", kind))
    }
    write_atomic(path, json.dumps(about | {"modules": modules} | groups, indent=1).encode())


def read_json(path: str) -> Sensitivity:
    """What `write_json` wrote. Raises UserError for any other file."""
    try:
        modules = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))["modules"]
        squares, sizes = np.array([each["gradient"] for each in modules]).T, [each["size"] for each in modules]
        return Sensitivity([each["module"] for each in modules], squares, np.array(sizes, float))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a sensitivity.json of this command ({error}).") from None


def write_pattern(path: Path, ranks: dict[str, int], depth: int, comment: str) -> None:
    """A YAML file for adapter.rank_pattern. It names every module there is, so what got no rank stays out anywhere."""
    lines = [f"{name}: {ranks.get(name, 0)}" for name in adaptable(depth)]
    write_atomic(path, "\n".join([f"# {comment}", *lines, ""]).encode())


def picture(path: Path, columns: dict[str, dict[str, float]]) -> None:
    """Maps of numbers by module, kinds downwards and blocks to the right; empty where there is no number above 0."""
    from matplotlib.figure import Figure

    names = list(next(iter(columns.values())))
    kinds, blocks = list(dict.fromkeys(map(kind, names))), list(dict.fromkeys(map(block, names)))
    figure = Figure(figsize=(4 + 0.3 * len(blocks), (0.6 + 0.28 * len(kinds)) * len(columns)), layout="constrained")
    for axes, (title, numbers) in zip(figure.subplots(len(columns), squeeze=False)[:, 0], columns.items(), strict=True):
        grid = np.full((len(kinds), len(blocks)), np.nan)
        for name, number in numbers.items():
            grid[kinds.index(kind(name)), blocks.index(block(name))] = number if number > 0 else np.nan
        image = axes.imshow(grid, aspect="auto", cmap="magma", norm="linear" if title == "rank" else "log")
        axes.set(title=title, xlabel="block", xticks=range(len(blocks)), yticks=range(len(kinds)), yticklabels=kinds)
        axes.set_xticklabels([name.partition(".")[2] for name in blocks])
        figure.colorbar(image, ax=axes)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def show(found: Sensitivity, ranks: dict[str, int], top_k: int, console: Console) -> None:
    """The modules with the largest scores, and the shares of blocks and of kinds."""
    table = Table("module", "sensitivity", "spread", "of all the gradient", "rank", title="most sensitive modules")
    share = found.gradient / found.gradient.sum()
    for i in np.argsort(-found.scores)[:top_k]:
        name = found.modules[i]
        table.add_row(name, f"{found.scores[i]:.3g}", f"{found.spread[i]:.0%}", f"{share[i]:.1%}", str(ranks[name]))
    console.print(table)
    for title, part in (("kind", kind), ("block", block)):
        table = Table(title, "of the gradient", "of the weights", "ratio")
        for name, (gradient, weights) in found.shares(part).items():
            table.add_row(name, f"{gradient:.1%}", f"{weights:.1%}", f"{gradient / weights:.2f}")
        console.print(table)


def compare(found: Sensitivity, other: Sensitivity, top_k: int, console: Console) -> float:
    """Where two datasets pull differently, told by share of the gradient -> Spearman's correlation of the scores."""
    common = [name for name in found.modules if name in other.modules]
    if len(common) < 2:
        raise UserError("against names a file without the modules measured here: it is of another model or adapter.")
    shares = [dict(zip(each.modules, each.gradient / each.gradient.sum(), strict=True)) for each in (found, other)]
    scores = [dict(zip(each.modules, each.scores, strict=True)) for each in (found, other)]
    table = Table("module", "here", "there", "here / there", title="where the two differ most")
    ratios = {name: shares[0][name] / max(shares[1][name], np.finfo(float).tiny) for name in common}
    for name in sorted(common, key=lambda name: -abs(np.log(max(ratios[name], np.finfo(float).tiny))))[:top_k]:
        table.add_row(name, f"{shares[0][name]:.2%}", f"{shares[1][name]:.2%}", f"{ratios[name]:.2f}")
    correlation = float(spearmanr(*([each[name] for name in common] for each in scores)).statistic)
    console.print(table)
    console.print(f"Spearman's correlation of the two datasets' scores: {correlation:.3f}")
    return correlation


# ---------------------------------------------------------------- the command


def measure_job(cfg: DictConfig, base, hardware: Hardware) -> tuple[Sensitivity, int]:
    """Preprocess what is missing, load the model, measure -> what was found, and how many songs were left out."""
    from hydra.utils import instantiate

    from acestep_lora import runs

    data = runs.encoded_songs(cfg, base, hardware)
    module = FlowModule(
        base,
        Probes(instantiate(cfg.adapter), cfg.seed),
        optimizer=torch.optim.SGD,
        dtype=hardware.dtype,
        recompute=10**3 if hardware.recompute == "all" or hardware.recompute == "auto" and hardware.memory else 0,
        attention=hardware.attention,
        quantize=cfg.model.quantize,
        seed=cfg.seed,
    )
    device = torch.device(hardware.device)
    module.load(device)
    module.to(device)
    found = measure(module, data.train_set, hardware, cfg.repeats, cfg.songs, cfg.dataset.batch_size)
    return found, len(data.bad)


def main(cfg: DictConfig) -> int:
    from hydra.utils import instantiate

    from acestep_lora import cli, plan, runs

    if cfg.repeats < 1 or cfg.rank_step < 1:
        raise UserError(f"repeats={cfg.repeats} and rank_step={cfg.rank_step} must both be at least 1.")
    if cfg.budget is not None:
        parse_count(cfg.budget)
    hardware, base = instantiate(cfg.hardware), runs.find_base(cfg.model)
    shape, console = plan.transformer_shape(cfg, base), Console(width=None if sys.stdout.isatty() else 160)
    other = read_json(cfg.against) if cfg.against else None
    found, left_out = (read_json(cfg.measured), 0) if cfg.measured else measure_job(cfg, base, hardware)
    ranks, total = make_pattern(cfg, shape, found)
    folder = Path(cfg.output_dir).expanduser()
    about = {"model": f"{cfg.model.repo}/{cfg.model.variant}", "adapter": cfg.adapter.name, "parameters": total}
    about |= {"seed": cfg.seed, "repeats": len(found.squares)}
    columns = {"sensitivity": dict(zip(found.modules, found.scores, strict=True)), "rank": ranks}
    show(found, ranks, cfg.top_k, console)
    if other:
        about["spearman"] = compare(found, other, cfg.top_k, console)
        columns["sensitivity of the other dataset"] = dict(zip(other.modules, other.scores, strict=True))
    write_json(folder / "sensitivity.json", found, ranks, about)
    comment = f"{total:,} parameters of adapter={cfg.adapter.name} on {about['model']}"
    write_pattern(folder / "rank_pattern.yaml", ranks, shape["num_hidden_layers"], comment)
    picture(folder / "sensitivity.png", columns)
    chosen = [f"adapter={cfg.adapter.name}"] + ["adapter.mlp=true"] * any(ranks[n] for n in ranks if ".mlp." in n)
    console.print(f"{sum(rank > 0 for rank in ranks.values())} modules, {total:,} parameters: {folder}", soft_wrap=True)
    console.print(
        f"  python train.py {' '.join(chosen)} adapter.rank_pattern={folder / 'rank_pattern.yaml'} ...", soft_wrap=True
    )
    return cli.LEFT_OUT if left_out else 0


if __name__ == "__main__":
    from acestep_lora import cli

    cli.main("sensitivity", main)
