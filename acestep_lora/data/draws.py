"""Which songs an epoch takes, in which order, cut into which batches: a function of (seed, epoch) alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Sampler

from acestep_lora.randomness import generator


@dataclass(frozen=True)
class Draw:
    """One item of an epoch: which track, where in the epoch's global order, and its place in its optimizer window."""

    track: int
    epoch: int
    position: int
    slot: int
    window: int
    weight: float = 1.0


def cut(draws: list[Draw], batch_size: int, world: int) -> list[list[Draw]]:
    """Batches of consecutive draws, as many for each rank: an idle rank repeats an item at weight zero."""
    batches = [draws[first : first + batch_size] for first in range(0, len(draws), batch_size)]
    return batches + [[replace(draws[0], weight=0.0)]] * (-len(batches) % world)


class EpochOrder(Sampler[list[Draw]]):
    """The batches of an epoch for one rank, a function of (seed, epoch) alone.

    The epoch is shuffled, loosely sorted by length so that neighbours are alike, cut into optimizer windows of
    batch_size * accumulate * world items, and the windows are shuffled; each window is then dealt out to ranks and
    micro-batches. A window's items do not depend on how it is dealt, so one rank or four train on the same steps.

    dataset: TrainSongs; of it, the seed, the songs' repeats and the items' lengths are used.
    """

    def __init__(self, dataset, batch_size: int, accumulate: int, rank: int = 0, world: int = 1) -> None:
        self.dataset, self.batch_size, self.accumulate = dataset, batch_size, accumulate
        self.rank, self.world, self.epoch, self.start = rank, world, 0, 0
        self.cut = [batch_size, accumulate, world]
        self.items = sum(song.track.repeat for song in dataset.songs)
        self.sampler = self  # Lightning calls batch_sampler.sampler.set_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> list[int]:
        """Song indices of the epoch in its global order, repeats included."""
        dataset, names = self.dataset, (self.dataset.seed, "order", self.epoch)
        indices = [i for i, song in enumerate(dataset.songs) for _ in range(song.track.repeat)]
        shuffled = torch.randperm(len(indices), generator=generator(*names)).tolist()
        jitter = (torch.rand(len(indices), generator=generator(*names, "jitter")) * 0.3 + 0.85).tolist()

        def alike(items: list[int]) -> list[int]:
            return sorted(items, key=lambda item: dataset.length(indices[item]) * jitter[item])

        size = self.batch_size * self.accumulate * self.world
        rest = len(indices) % size  # the partial window: any items, or the longest songs would always be in it
        body = alike(shuffled[rest:])
        windows = [body[first : first + size] for first in range(0, len(body), size)]
        turns = torch.randperm(len(windows), generator=generator(*names, "windows")).tolist()
        dealt = [*(windows[turn] for turn in turns), alike(shuffled[:rest])]
        return [indices[item] for window in dealt for item in window]

    def batches(self) -> list[list[Draw]]:
        """Every rank's batches of the epoch, this rank's being every world-th."""
        order, size, dealt = self.order(), self.batch_size * self.accumulate * self.world, []
        for first in range(0, len(order), size):
            window = order[first : first + size]
            draws = [Draw(i, self.epoch, first + slot, slot, len(window)) for slot, i in enumerate(window)]
            dealt += cut(draws, self.batch_size, self.world)
        return dealt

    def padding(self) -> float:
        """Share of the epoch's frames, over all ranks, that only fill up batches, [0, 1)."""
        lengths = [[self.dataset.length(draw.track) for draw in batch] for batch in self.batches()]
        return 1 - sum(map(sum, lengths)) / sum(len(batch) * max(batch) for batch in lengths)

    def __iter__(self) -> Iterator[list[Draw]]:
        start, self.start = self.start, 0
        yield from self.batches()[self.rank :: self.world][start:]

    def __len__(self) -> int:
        whole, rest = divmod(self.items, self.batch_size * self.accumulate * self.world)
        return whole * self.accumulate + -(-rest // (self.batch_size * self.world))
