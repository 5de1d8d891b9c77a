"""A soak: train, kill, resume, export and generate over and over, watching memory, file handles and bits.

python tests/soak.py --minutes 60 --out FOLDER

A cycle starts a training as a process of its own, kills it at a random moment with a random signal, a few times over,
then finishes it in *this* process, exports the adapter and generates a clip, also in this process: what leaks shows
here. Adapter, losses and clip must equal, bit for bit, those of a run that nobody disturbed. One JSON line per cycle
goes to FOLDER/soak.jsonl and to the output; FOLDER/summary.json has the verdict, which is also the exit code.
"""

import argparse
import csv
import ctypes
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}

import psutil  # noqa: E402
import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from scipy.stats import theilslopes  # noqa: E402

import generate  # noqa: E402
import train  # noqa: E402
from acestep_lora import cli, export  # noqa: E402
from acestep_lora.runs import LOCK  # noqa: E402

STEPS = 48
OPTIONS = [
    *("logger=csv", "sample=false", "hardware=cpu", "dataset.crop_seconds=2", "ema.decay=0.9", "adapter.dropout=0.1"),
    *("trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=1", "trainer.check_val_every_n_epoch=1"),
    *(f"trainer.max_steps={STEPS}", "save_every_n_steps=2", "name=soak"),
]
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
WARM_UP = 3  # cycles in which libraries still load and allocators still grow
PATIENCE = 600  # seconds for a step, a checkpoint and the way out, on a machine that does other things too
GROWTH = 0.05  # of the resident memory, over the whole soak, that is still called flat


def configure(command: str, *overrides: str):
    cli.register()
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        return compose(command, overrides=cli.quote_overrides(list(overrides)))


class Soak:
    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.random, self.process = out, random.Random(seed), psutil.Process()
        self.cache = f"dataset.cache_dir={out / 'cache'}"
        self.reference = self.finish(out / "reference", resume=False)
        self.startup, self.seconds = self.time_a_process()

    def overrides(self, folder: Path, resume: bool) -> list[str]:
        return [*OPTIONS, self.cache, f"output_dir={folder}", *["resume=auto"] * resume]

    def finish(self, folder: Path, resume: bool) -> dict[str, bytes]:
        """Train to the end, export and generate here -> everything that must come out the same."""
        adapter, clips = folder / "adapter", folder / "clips"
        train.train(configure("train", *self.overrides(folder, resume)), folder, given=True)
        exported = folder / "exported"
        export.main(configure("export", f"adapter.path={adapter}", "format=comfyui", f"output={exported}"))
        words = ["hardware=cpu", "prompt=a slow tune", "duration=3", "steps=2", f"output_dir={clips}"]
        (clip, *_) = generate.generate(configure("generate", f"adapter.path={adapter}", *words))
        with (folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        names = ("step", "train/loss", "train/grad_norm", "lr", "val/loss")
        (comfyui,) = exported.iterdir()
        return {
            "losses": json.dumps([[row.get(name, "") for name in names] for row in rows]).encode(),
            "adapter": (adapter / "adapter_model.safetensors").read_bytes(),
            "comfyui": comfyui.read_bytes(),
            "clip": Path(clip).read_bytes(),
        }

    def start(self, folder: Path, resume: bool) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "train.py"), *self.overrides(folder, resume)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.out)

    def time_a_process(self) -> tuple[float, float]:
        """Seconds until the first checkpoint of a training process, and until its end."""
        folder, started, first = self.out / "timed", time.monotonic(), None
        process = self.start(folder, resume=False)
        drain = threading.Thread(target=process.stdout.read)
        drain.start()
        while process.poll() is None:
            first = first or ((time.monotonic() - started) if any(folder.glob("checkpoints/epoch_*")) else None)
            time.sleep(0.05)
        drain.join()
        if process.returncode or first is None:
            raise SystemExit(f"a training that nobody disturbs does not end well: exit code {process.returncode}")
        shutil.rmtree(folder)
        return first, time.monotonic() - started

    def disturb(self, folder: Path) -> dict:
        """Start or resume a training and end it at a random moment -> what was done and how it ended."""
        process = self.start(folder, resume=folder.exists())
        after = self.random.uniform(self.startup / 2, (self.startup + self.seconds) / 2)
        number = self.random.choice(SIGNALS)
        peak, deadline, sent, said = 0, time.monotonic() + after, False, []
        drain = threading.Thread(target=lambda: said.append(process.stdout.read()))
        drain.start()
        while process.poll() is None:
            peak = max(peak, _rss(process.pid))
            if not sent and time.monotonic() > deadline:
                process.send_signal(number)
                sent = True
            if time.monotonic() > deadline + PATIENCE:
                process.kill()
                raise SystemExit(f"a training did not end within {PATIENCE} s of {number.name}: see {folder}")
            time.sleep(0.1)
        drain.join()
        if not sent:  # what was timed was slower than it is now
            self.startup, self.seconds = self.startup / 2, self.seconds / 2
        text = said[0].decode(errors="replace")
        told = {"after_s": round(after, 1), "signal": number.name if sent else None, "code": process.returncode}
        told |= {"peak_rss_mb": round(peak / 2**20)}
        if "Traceback" in text:
            told["traceback"] = text[-2000:]
        return told

    def cycle(self, number: int) -> dict:
        folder, started = self.out / f"cycle_{number:04d}", time.monotonic()
        kills = [self.disturb(folder) for _ in range(self.random.randint(1, 4))]
        found = self.finish(folder, resume=folder.exists())
        differs = sorted(name for name in found if found[name] != self.reference[name])
        left = sorted(str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != LOCK)
        if not differs and not any("traceback" in kill for kill in kills):
            shutil.rmtree(folder)  # a cycle that went wrong is kept
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what is free, but not given back, comes and goes
        return {
            "cycle": number,
            "seconds": round(time.monotonic() - started, 1),
            "kills": kills,
            "identical": not differs,
            "differs": differs,
            "left_behind": left,
            "rss_mb": round(_rss(os.getpid()) / 2**20, 1),
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1),
            "handles": self.process.num_fds(),
            "open": _open_handles(),
            "threads": self.process.num_threads(),
            "children": len(self.process.children(recursive=True)),
        }


def _open_handles() -> list[str]:
    """What each handle of this process leads to, so that one more has a name; empty where /proc is not."""
    return sorted(str(path.readlink()) for path in Path("/proc/self/fd").glob("*") if path.is_symlink())


def _rss(pid: int) -> int:
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def summary(cycles: list[dict], minutes: float) -> dict:
    """The verdict: no trend in memory, no more handles, threads or children than before, every cycle bit-identical."""
    warm = cycles[WARM_UP:] if len(cycles) > 2 * WARM_UP else cycles
    memory = [cycle["rss_mb"] for cycle in warm]
    slope, _, low, high = theilslopes(memory) if len(memory) > 1 else (0.0,) * 4
    growth = slope * len(memory) / memory[0]
    half = len(warm) // 2
    grown = [
        name
        for name in ("handles", "threads", "children")
        if half and max(c[name] for c in warm[half:]) > max(c[name] for c in warm[:half])
    ]
    kills = [kill for cycle in cycles for kill in cycle["kills"]]
    sent = [kill["signal"] for kill in kills if kill["signal"]]
    flat = bool(growth <= GROWTH) and not grown
    identical = sum(cycle["identical"] for cycle in cycles)
    tracebacks = sum("traceback" in kill for kill in kills)
    return {
        "minutes": round(minutes, 1),
        "cycles": len(cycles),
        "identical": identical,
        "kills": {name: sent.count(name) for name in sorted(set(sent))},
        "tracebacks": tracebacks,
        "left_behind": sorted({name for cycle in cycles for name in cycle["left_behind"]}),
        "rss_mb": [min(memory), max(memory)],
        "rss_mb_per_cycle": [round(slope, 3), round(low, 3), round(high, 3)],
        "rss_growth": round(growth, 4),
        "handles": [min(c["handles"] for c in warm), max(c["handles"] for c in warm)],
        "grown": grown,
        "flat": flat,
        "passed": flat and identical == len(cycles) and not tracebacks and len(sent) >= len(cycles),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out, started = options.out.resolve(), time.monotonic()
    out.mkdir(parents=True)
    os.environ["XDG_CACHE_HOME"] = str(out / "home")
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl+C
    cli.quiet()
    soak, cycles = Soak(out, options.seed), []
    with (out / "soak.jsonl").open("w", encoding="utf-8") as lines:
        while time.monotonic() < started + 60 * options.minutes or not cycles:
            cycles.append(soak.cycle(len(cycles)))
            line = json.dumps(cycles[-1])
            print(line, flush=True)
            print(line, file=lines, flush=True)
    verdict = summary(cycles, (time.monotonic() - started) / 60)
    (out / "summary.json").write_text(json.dumps(verdict, indent=2), encoding="utf-8")
    print(json.dumps(verdict), flush=True)
    raise SystemExit(0 if verdict["passed"] else 1)


if __name__ == "__main__":
    main()
