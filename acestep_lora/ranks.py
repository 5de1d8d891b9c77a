"""Ranks under a parameter budget: more where the gradient is, fewer where a rank costs more."""

import heapq
import re
from collections.abc import Mapping

from acestep_lora.errors import UserError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_count(text: str | int | float) -> int:
    """ "44M", "5.5m", "800k" or a number -> parameters. Raises UserError for anything else, and for less than one."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([kmb]?)", str(text).strip().lower())
    count = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count < 1:
        raise UserError(f"budget={text} is not a number of parameters such as 44M, 800k or 5500000.")
    return count


def share_out(
    gains: Mapping[str, float], costs: Mapping[str, int], budget: int, step: int = 4, largest: int = 256
) -> dict[str, int]:
    """The rank of every module, multiples of `step` up to `largest`, that together cost at most `budget`.

    What a module of squared gradient g still lacks at rank r is taken to be g / (1 + r), and the sum of that is made
    as small as the budget allows, by giving the next ranks to whichever module gains most per parameter. Far from the
    bounds this is r ~ sqrt(g / cost), the allocation of Neyman (1934).

    Args:
        gains: module -> squared gradient of its whole weight.
        costs: module -> parameters of one rank.
    """

    def offer(name: str, rank: int) -> tuple[float, str, int]:
        gain = gains[name] / (1 + rank) - gains[name] / (1 + rank + step)
        return -gain / (costs[name] * step), name, rank

    ranks = dict.fromkeys(gains, 0)
    left, offers = budget, [offer(name, 0) for name in gains if step <= largest]
    heapq.heapify(offers)
    while offers:
        _, name, rank = heapq.heappop(offers)
        if costs[name] * step > left:
            continue
        left -= costs[name] * step
        ranks[name] = rank + step
        if rank + 2 * step <= largest:
            heapq.heappush(offers, offer(name, rank + step))
    if not any(ranks.values()):
        least = step * min(costs[name] for name in gains)
        raise UserError(f"budget={budget} is too small: the smallest rank of any module takes {least} parameters.")
    return ranks
