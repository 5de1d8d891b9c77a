"""Search for settings.

python -m acestep_lora.sweep dataset.dir=/music/mine optimizer.lr='tag(log, interval(1e-5, 1e-3))'

Each trial is a run of train.py in a folder of its own, composed by Hydra from the same command line; Optuna chooses the
values and ends trials that fall behind. Its journal is a file in the study's folder: a search that was stopped, however
it was, goes on with the trial it was in, and several processes may work on one study.
"""

import logging
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from acestep_lora import cli
from acestep_lora.errors import UserError
from acestep_lora.overrides import quote_overrides
from acestep_lora.trials import Trial, print_table, ranked, write_sweep_page

log = logging.getLogger(__name__)

OWN = ("study", "trials", "space", "sampler", "pruner", "hydra")
"""Keys of conf/sweep.yaml; everything else on the command line is train.py's."""


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(arguments of this command, overrides of train.py)."""

    def own(text: str) -> bool:
        return text.startswith("-") or text.lstrip("+~").partition("=")[0].partition(".")[0] in OWN

    return [text for text in arguments if own(text)], [text for text in arguments if not own(text)]


@dataclass(frozen=True)
class Space:
    """What is searched, and the overrides that all trials share."""

    searched: dict[str, Override]
    shared: list[str]

    @classmethod
    def read(cls, job: list[str], default: DictConfig) -> "Space":
        """Of train.py's overrides; ranges among them replace the default space."""
        parser, shared = OverridesParser.create(), ["sample=false"]
        searched = {}
        for text in quote_overrides(["-m", *job])[1:]:
            override = parser.parse_override(text)
            if override.is_sweep_override():
                searched[override.key_or_group] = override
            else:
                shared.append(text)
        if not searched:
            searched = {key: parser.parse_override(f"{key}={text}") for key, text in default.items()}
        return cls(searched, shared)

    def suggest(self, trial) -> dict[str, str]:
        """A value for each key, as it would be typed."""
        return {key: _suggest(trial, key, override) for key, override in self.searched.items()}

    def compose(self, settings: dict[str, str]) -> DictConfig:
        return compose("train", [*self.shared, *_typed(settings)], return_hydra_config=True)

    def defaults(self) -> dict[str, str]:
        """What the searched keys are where nothing is chosen for them."""
        cfg = self.compose({})
        choices = cfg.hydra.runtime.choices
        return {key: str(choices[key] if key in choices else OmegaConf.select(cfg, key)) for key in self.searched}


def _typed(settings: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def _suggest(trial, key: str, override: Override) -> str:
    values = override.value()
    if not isinstance(values, IntervalSweep):
        return trial.suggest_categorical(key, list(override.sweep_string_iterator()))
    whole, options = isinstance(values.start, int), {"log": "log" in values.tags}
    number = (trial.suggest_int if whole else trial.suggest_float)(key, values.start, values.end, **options)
    return str(number) if whole else f"{number:.4g}"


class Search:
    """A study in its folder. Trial 0 leaves the settings as they are: the others are compared with it."""

    def __init__(self, cfg: DictConfig, space: Space) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder, self.wanted, self.space = Path(cfg.study).expanduser(), cfg.trials, space
        self.defaults, self.metric = space.defaults(), space.compose({}).metric
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = str(self.folder / "journal.log")
        storage = optuna.storages.JournalStorage(JournalFileBackend(journal, JournalFileOpenLock(journal)))
        self.study = optuna.create_study(
            storage=storage, study_name="sweep", pruner=instantiate(cfg.pruner), load_if_exists=True
        )
        self.sampler = instantiate(cfg.sampler)
        self._check()

    def _check(self) -> None:
        """One study, one question: trials of other songs or other ranges cannot be compared."""
        asked = {"shared": self.space.shared, "searched": [o.input_line for o in self.space.searched.values()]}
        before = self.study.user_attrs
        if not any(trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False)):
            for name, texts in asked.items():
                self.study.set_user_attr(name, texts)
        elif before != asked:
            changed = set(before["shared"] + before["searched"]) ^ set(asked["shared"] + asked["searched"])
            raise UserError(
                f"study={self.folder} was begun with other settings ({', '.join(sorted(changed))}): "
                "give those, or another study."
            )

    def run(self) -> None:
        import optuna

        began, done = time.monotonic(), 0
        while (trial := self._next()) is not None:
            state, value = optuna.trial.TrialState.COMPLETE, None
            try:
                value = self._train(trial)
            except optuna.TrialPruned:
                state = optuna.trial.TrialState.PRUNED
            except Exception as error:  # noqa: BLE001 - whatever ends one trial, the others are run
                if isinstance(error, cli.TOLD):
                    if trial.number == 0:
                        raise  # so would the others
                    log.error("trial %d: %s", trial.number, cli.sentence(error))
                else:
                    log.exception("trial %d failed", trial.number)
                state = optuna.trial.TrialState.FAIL
            self.study.tell(trial, value, state)
            done, trials = done + 1, self.trials()
            write_sweep_page(self.folder, trials, self.metric, self.verdict())
            minutes = max(0, self.wanted - len(trials)) * (time.monotonic() - began) / done / 60
            told = trials[trial.number].told
            log.info("trial %d: %s (of %d, about %.0f min left)", trial.number, told, self.wanted, minutes)

    def _next(self):
        """A trial whose process is gone, else a new one, else None."""
        import optuna

        mine = psutil.Process()
        process = [socket.gethostname(), mine.pid, mine.create_time()]
        for trial in self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if not _alive(trial.user_attrs.get("process")):
                log.info("going on with trial %d", trial.number)
                again = optuna.trial.Trial(self.study, trial._trial_id)
                again.set_user_attr("process", process)
                return again
        if (number := len(self.study.get_trials(deepcopy=False))) >= self.wanted:
            return None
        self.study.sampler = self.sampler(seed=number)  # draws the same whether or not the search was ever stopped
        new = self.study.ask()
        new.set_user_attr("process", process)
        return new

    def _train(self, trial) -> float:
        """Run a trial, or go on with it -> the metric. Raises optuna.TrialPruned."""
        import train
        from acestep_lora.callbacks.prune import Prune

        settings = self.space.suggest(trial) if trial.number else {}
        trial.set_user_attr("settings", settings or self.defaults)
        cfg, folder = self.space.compose(settings), self.folder / str(trial.number)
        with open_dict(cfg):
            del cfg.hydra
        cfg.resume, cfg.output_dir = "auto", str(folder)
        if "wandb" in cfg.logger:
            cfg.logger.wandb.group = self.folder.name
        log.info("trial %d: %s", trial.number, " ".join(_typed(settings)) or "the settings as they are")
        result = train.train(cfg, folder, given=True, callbacks=[Prune(trial, cfg.metric)])
        if result.metric is not None:
            return result.metric
        reported = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        if not reported:
            raise UserError(f"{cfg.metric} was never measured: give a shorter trainer.check_val_every_n_epoch.")
        return reported[max(reported)]  # it had been finished, but not told

    # ------------------------------------------------------------ what came of it

    def trials(self) -> list[Trial]:
        found = []
        for trial in self.study.get_trials(deepcopy=False):
            kind = trial.state.name
            note = {"COMPLETE": "", "FAIL": "failed"}.get(kind, kind.lower())
            if kind == "PRUNED":
                note = f"pruned at step {trial.last_step} ({trial.value:.5f})"
            value = trial.value if kind == "COMPLETE" else None
            found.append(Trial(self.folder / str(trial.number), trial.user_attrs.get("settings", {}), value, note))
        return found

    def verdict(self) -> str:
        """One line: the best settings, if they are better than those that were there."""
        trials = self.trials()
        best, first = ranked(trials)[0], trials[0]
        if best.metric is None:
            return "No trial was finished."
        if best is first:
            return f"Nothing was better than the settings as they are ({self.metric} {first.told})."
        changed = " ".join(_typed(best.settings))
        return f"{changed} gave {self.metric} {best.told}; the settings as they are {first.told}."


def _alive(process: list | None) -> bool:
    """Whether [host, pid, start time] still runs. Of another host that is not known, so it counts as running."""
    if process is None:
        return False
    host, pid, started = process
    if host != socket.gethostname():
        return True
    try:
        return psutil.Process(pid).create_time() == started
    except psutil.NoSuchProcess:
        return False


def main(cfg: DictConfig, job: list[str]) -> int:
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError("A search needs Optuna: pip install 'acestep-lora[sweep]'.") from None
    sys.path.insert(0, str(cli.ROOT))  # train.py is a script beside the package
    search = Search(cfg, Space.read(job, cfg.space))
    search.run()
    trials = search.trials()
    print_table(trials, search.metric)
    print(f"{search.verdict()}\npage: {search.folder / 'sweep.html'}")
    print(f"to go on: the same command with study={search.folder} trials={2 * cfg.trials}")
    return 1 if any(trial.note == "failed" for trial in trials) else 0


if __name__ == "__main__":
    sys.argv[1:], job = split(sys.argv[1:])
    cli.main("sweep", lambda cfg: main(cfg, job))
