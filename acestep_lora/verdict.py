"""What a run's curves say, in words: arrays in, sentences out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

LITTLE = 0.01
"""Of the base model's loss: a change that is none."""
LATE = 0.8
"""Of a run: a best value behind it is at the end."""
FORM, SOUND = 0.7, 0.3
"""Timesteps from which a clip's form is decided, and up to which its sound is."""


@dataclass(frozen=True)
class Curves:
    """Losses of a run, each with its step, in ascending order; base is the base model's on the held-out songs.

    last, base_last: the last validation by timestep and the base model's. held_out: how many songs val is measured on
    that were not trained on, 0 where it is the training songs themselves, None where that is unknown. seen, seen_base:
    as val and base, on as many songs that were trained on.
    """

    train: Sequence[tuple[int, float]]
    val: Sequence[tuple[int, float]]
    base: float | None
    last: dict[float, float] = field(default_factory=dict)
    base_last: dict[float, float] = field(default_factory=dict)
    held_out: int | None = None
    seen: Sequence[tuple[int, float]] = ()
    seen_base: float | None = None

    @property
    def best(self) -> tuple[int, float]:
        """Step and loss of the best validation."""
        return min(self.val, key=lambda point: point[1])

    @property
    def worse_everywhere(self) -> bool:
        """Whether since the best validation the songs that are trained on have become worse, too."""
        if self.held_out == 0:
            return True
        seen = dict(self.seen)
        known = self.seen_base is not None and self.best[0] in seen
        return known and (self.seen[-1][1] - seen[self.best[0]]) / self.seen_base > LITTLE


@dataclass(frozen=True)
class Verdict:
    """kind: unmeasured, diverged, nothing, unstable, memorising, learning or converged; what was seen; what to try."""

    kind: str
    seen: list[str]
    next: list[str]


def judge(curves: Curves) -> Verdict:
    """Whether a run learnt, and whether it went on to learn its songs by heart."""
    broken = next((step for step, loss in (*curves.train, *curves.val) if not math.isfinite(loss)), None)
    if broken is not None:
        return Verdict(
            "diverged",
            [f"At step {broken} the loss is no number any more: what came after is worth nothing."],
            ["Take a third of optimizer.lr, and start again."],
        )
    if not curves.val or curves.base is None:
        return Verdict("unmeasured", ["Nothing was validated yet, so nothing can be said."], [])
    kind = _kind(curves)
    return Verdict(kind, [*_SEEN[kind](curves), *_gap(curves), *_where(curves), *_doubt(curves)], _NEXT[kind])


def _kind(curves: Curves) -> str:
    step, best = curves.best
    last_step, last = curves.val[-1]
    if 1 - best / curves.base < LITTLE:
        return "nothing"
    if step < LATE * last_step and (last - best) / curves.base > LITTLE:
        return "unstable" if curves.worse_everywhere else "memorising"
    before = [loss for at, loss in curves.val if at <= LATE * last_step]
    still = step >= LATE * last_step and before and (min(before) - best) / curves.base > LITTLE
    return "learning" if still else "converged"


def _nothing(curves: Curves) -> list[str]:
    return [f"It is hardly better than the base model: {1 - curves.best[1] / curves.base:.1%} under it at best."]


def _memorising(curves: Curves) -> list[str]:
    (step, best), (_, last) = curves.best, curves.val[-1]
    return [
        f"It was best at step {step}, {1 - best / curves.base:.1%} under the base model. Since then songs it has not "
        f"heard get worse again, by {(last - best) / curves.base:.1%}: it is learning its songs by heart.",
        "Use adapter_best/.",
    ]


def _unstable(curves: Curves) -> list[str]:
    step, best = curves.best
    return [
        f"It was best at step {step}, {1 - best / curves.base:.1%} under the base model. Since then the loss rises on "
        "the songs it trains on, too: its steps are too large.",
        "Use adapter_best/.",
    ]


def _learning(curves: Curves) -> list[str]:
    return [f"It is still getting better, {1 - curves.best[1] / curves.base:.1%} under the base model by now."]


def _converged(curves: Curves) -> list[str]:
    step, best = curves.best
    use = "adapter/ and adapter_best/ are the same" if step == curves.val[-1][0] else "adapter_best/ is a little better"
    return [f"It has learnt what it can with these settings, {1 - best / curves.base:.1%} under the base model; {use}."]


_SEEN = {
    "nothing": _nothing,
    "unstable": _unstable,
    "memorising": _memorising,
    "learning": _learning,
    "converged": _converged,
}
_NEXT = {
    "nothing": [
        "Train longer (trainer.max_epochs), or with three times the optimizer.lr.",
        "Listen to the songs with their captions: does what is written describe what is heard?",
    ],
    "unstable": ["Take a third of optimizer.lr, and start again."],
    "memorising": [
        "Stop earlier: early_stopping.patience=5 ends a run when nothing gets better.",
        "More songs, or more different ones, help most.",
        "A smaller adapter (half of adapter.r) or adapter.dropout=0.1 remembers less.",
        "Generating with adapter.scale=0.7 to 0.9 often sounds freer.",
    ],
    "learning": ["Go on: resume=auto with a larger trainer.max_epochs."],
    "converged": [
        "If it does not sound close enough, give it room: twice the adapter.r, adapter.mlp=true, or adapter=lokr.",
        "python -m acestep_lora.evaluate tells which strength suits it, and compares it with other runs.",
    ],
}


def _gap(curves: Curves) -> list[str]:
    if not curves.seen or curves.seen_base is None:
        return []
    trained, held = 1 - curves.seen[-1][1] / curves.seen_base, 1 - curves.val[-1][1] / curves.base
    return [
        f"Measured alike, it is {trained:.0%} under the base model on songs it trains on and {held:.0%} on songs held "
        f"out, a gap of {100 * (trained - held):.0f} points."
    ]


def _where(curves: Curves) -> list[str]:
    saved = {t: 1 - loss / curves.base_last[t] for t, loss in curves.last.items() if t in curves.base_last}
    form = [gain for t, gain in saved.items() if t >= FORM]
    sound = [gain for t, gain in saved.items() if t <= SOUND]
    if not form or not sound:
        return []
    form, sound = fmean(form), fmean(sound)
    if abs(form - sound) < LITTLE:
        return [f"It learnt as much of the form (rhythm, melody, arrangement) as of the sound: {form:.0%}."]
    more = "the form (rhythm, melody, arrangement)" if form > sound else "the sound (timbre, detail)"
    return [f"It learnt more of {more}: {form:.0%} at high noise, where form is decided, {sound:.0%} at low noise."]


def _doubt(curves: Curves) -> list[str]:
    if curves.held_out == 0:
        return ["No song was held out (five are needed), so the loss cannot tell learning from learning by heart."]
    if curves.held_out in (1, 2):
        songs = "one song" if curves.held_out == 1 else "two songs"
        return [f"This is measured on {songs}: a hint. More songs, or dataset.val_fraction=0.2, make it surer."]
    return []
