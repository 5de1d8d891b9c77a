"""A dataset and a model that want to do harm: nothing in them runs, nothing is written where it should not be."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import NANO, VARIANT, base_model, write_songs
from safetensors.torch import save_file

from acestep_lora import basemodel, cli
from acestep_lora.adapter_files import read
from acestep_lora.adapters import AdapterError, read_pattern
from acestep_lora.data.cache import CacheError, Entry, read_upstream
from acestep_lora.data.track import read_dataset_json, scan
from acestep_lora.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, such names and sparse files are POSIX's")

WATCH = """
import os, runpy, sys
seen = open(os.environ["SEEN"], "a", buffering=1)
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        seen.write(f"write {os.path.abspath(arguments[0])!r}\\n")
    elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate"):
        for path in arguments[:2]:
            if isinstance(path, str):
                seen.write(f"write {os.path.abspath(path)!r}\\n")
    elif event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"):
        seen.write(f"run {event} {arguments!r}\\n")
sys.argv = sys.argv[1:]
sys.path.insert(0, os.getcwd())
sys.addaudithook(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


ANNOTATE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))
from pathlib import Path
from acestep_lora.annotate.annotator import Annotator, disagreements, unreviewed
from acestep_lora.annotate.transcribers import Lrc
from acestep_lora.data import lines
from acestep_lora.data.track import scan
folder = Path(sys.argv[1])
Annotator().run([Lrc()], lambda: scan(folder))
for track in scan(folder).tracks:
    disagreements(track)
    try:
        lines.align(track.lyrics, lines.read_lines(track.path), 30.0)
    except ValueError as error:
        assert len(str(error)) < 1000
unreviewed(scan(folder).tracks, "lyrics")
"""


class Harm:
    """As a pickle: makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Path -> content, or where a link leads; what is larger than any song by its size."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or path.is_dir():
            found[str(path)] = os.readlink(path) if path.is_symlink() else "folder"
        else:
            found[str(path)] = path.read_bytes() if path.stat().st_size < 1 << 20 else str(path.stat().st_size)
    return found


@pytest.fixture
def hostile(tmp_path) -> Path:
    """Two good songs and everything else that can be put beside them."""
    songs, precious, pwned = tmp_path / "songs", tmp_path / "precious", tmp_path / "pwned"
    precious.mkdir()
    (precious / "secret.txt").write_text("secret", encoding="utf-8")
    good = write_songs(songs, 24_000, count=2)
    harm = pickle.dumps(Harm(pwned))
    names = [
        "\x1b[2J\x1b]0;pwned\x07.wav",
        "$(mkdir pwned).wav",
        "; mkdir pwned;.wav",
        "-rf.wav",
        "CON.wav",
        "a:b?<c>.wav",
    ]
    for name in [*names, "\u202egpj.wav", "x" * 240 + ".wav", os.fsdecode(b"\xff\xfe.wav")]:
        shutil.copy(good[0], songs / name)
    for suffix in (".txt", ".lyrics.txt", ".caption.txt", ".json", ".lrc", ".lyrics.json"):
        (songs / f"song_1{suffix}").write_bytes(harm)
    (songs / "pickle.wav").write_bytes(harm)
    run = {"_target_": "os.mkdir", "path": str(pwned)}
    sidecar = {
        "caption": "fine",
        "genre": run,
        "custom_tag": run,
        "bpm": run,
        "_target_": "os.abort",
        "language": [run],
    }
    (songs / "song_0.json").write_text(json.dumps(sidecar), encoding="utf-8")
    with (songs / "song_0.lyrics.txt").open("wb") as file:
        file.truncate(4 << 30)
    (songs / "loop").symlink_to(songs, target_is_directory=True)
    (songs / "me.wav").symlink_to("me.wav")
    (songs / "passwd.wav").symlink_to("/etc/passwd")
    (songs / "zero.wav").symlink_to("/dev/zero")
    (songs / "precious").symlink_to(precious, target_is_directory=True)
    cache = songs / ".acestep"
    cache.mkdir()
    for name in ("files.json", "bad.json", f"song_0-{'0' * 16}.safetensors"):
        (cache / name).write_bytes(harm)
    (cache / ".song_0.tmp").symlink_to(precious / "secret.txt")
    return songs


def test_a_hostile_dataset_is_trained_on_and_does_nothing_else(hostile, tmp_path):
    before = {key: value for key, value in snapshot(hostile).items() if "/.acestep" not in key}
    precious, seen, out = snapshot(tmp_path / "precious"), tmp_path / "seen", tmp_path / "out"
    ours = {name: tmp_path / name for name in ("home", "temporary")}
    for folder in ours.values():
        folder.mkdir()
    environment = os.environ | {"HOME": str(ours["home"]), "XDG_CACHE_HOME": str(ours["home"]), "SEEN": str(seen)}
    environment |= {
        "TORCHINDUCTOR_CACHE_DIR": str(ours["temporary"]),
        "TMPDIR": str(ours["temporary"]),
        "WANDB_MODE": "disabled",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    quick = ["logger=csv", "hardware=cpu", "trainer.max_steps=1", "sample=false", "adapter.r=2"]
    done = subprocess.run(
        [sys.executable, "-c", WATCH, "train.py", f"dataset.dir={hostile}", f"output_dir={out}", *quick],
        cwd=cli.ROOT,
        env=environment,
        capture_output=True,
        timeout=600,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == cli.LEFT_OUT and b"Traceback" not in printed, printed.decode(errors="replace")
    assert b"\x1b]0;" not in printed and b"\x1b[2J" not in printed
    assert (out / "adapter/adapter_model.safetensors").is_file() and not (tmp_path / "pwned").exists()
    assert {key: value for key, value in snapshot(hostile).items() if "/.acestep" not in key} == before
    assert snapshot(tmp_path / "precious") == precious
    allowed = [str(path) for path in (out, hostile / ".acestep", *ours.values(), "/dev", "/proc", seen)]
    writes = [eval(line[6:]) for line in seen.read_text().splitlines() if line.startswith("write ")]  # our own repr
    elsewhere = {path for path in writes if not path.startswith(tuple(allowed)) and Path(path).name != "__pycache__"}
    assert writes and elsewhere <= {str(cli.ROOT)}  # hydra.run.dir; numba keeps what it compiled beside librosa
    started = [line for line in seen.read_text().splitlines() if line.startswith("run ")]
    assert not [line for line in started if "pwned" in line or "socket" in line]


def test_a_hostile_dataset_json(hostile, tmp_path):
    """It may name any song that can be read, and nothing else."""
    paths = ["../precious/secret.txt", "/etc/passwd", "../../../../etc/shadow.wav", "loop/loop/loop/song_0.wav"]
    paths += [
        "zero.wav",
        "file:///etc/other.wav",
        "https://example.invalid/a.wav",
        "a\0b.wav",
        "~root/a.wav",
        "$HOME/a.wav",
    ]
    run = {"_target_": "os.mkdir", "path": str(tmp_path / "pwned")}
    document = {"metadata": {"custom_tag": "t"}, "samples": [{"audio_path": path, "caption": run} for path in paths]}
    (hostile / "dataset.json").write_text(json.dumps(document), encoding="utf-8")
    found = read_dataset_json(hostile / "dataset.json")
    assert [track.path.name for track in found.tracks] == ["song_0.wav"] and not (tmp_path / "pwned").exists()
    (hostile / "dataset.json").write_text("[" + "0," * 100_000 + "0]", encoding="utf-8")
    with pytest.raises(UserError, match="100001 samples, more than 100000"):
        read_dataset_json(hostile / "dataset.json")


@pytest.mark.parametrize("layout", ["nano", "upstream"])
def test_code_that_comes_with_a_model_is_not_run(layout, tmp_path):
    folder = shutil.copytree(NANO, tmp_path / "model") if layout == "nano" else base_model(tmp_path / "model")
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    for config in (*folder.rglob("config.json"), *folder.rglob("tokenizer_config.json")):
        document = json.loads(config.read_text(encoding="utf-8"))
        document["auto_map"] = {name: ["evil.Evil", None] if "Tok" in name else "evil.Evil" for name in names}
        config.write_text(json.dumps(document), encoding="utf-8")
        (config.parent / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'pwned')!r})\nclass Evil: pass\n")
    base = basemodel.find(str(folder), variant="nano" if layout == "nano" else VARIANT, repo="a/b")
    basemodel.load_text_encoder(base, torch.float32, "cpu")
    basemodel.load_vae(base, torch.float32, "cpu")
    basemodel.load_condition_encoder(base, torch.float32, "cpu")
    config = base.text_encoder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "evil", "architectures": ["Evil"]}))
    with pytest.raises(basemodel.BaseModelError, match="cannot be used as part of a base model") as caught:
        basemodel.load_text_encoder(base, torch.float32, "cpu")
    assert "\n" not in str(caught.value) and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_missing_weights_are_not_made_up(part, tmp_path):
    """The libraries would draw them at random and go on."""
    from safetensors.torch import load_file

    folder = shutil.copytree(NANO, tmp_path / "model")
    [file] = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    weights.pop(sorted(weights)[0])
    save_file(weights, file, metadata={"format": "pt"})
    base = basemodel.find(str(folder), variant="nano", repo="a/b")
    with pytest.raises(basemodel.BaseModelError):
        getattr(basemodel, f"load_{part}")(base, torch.float32, "cpu")


# ---------------------------------------------------------------- claims of size


def yaml_bomb(path: Path) -> None:
    rows = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    path.write_text("\n".join(rows), encoding="utf-8")


def header_of_10_gb(path: Path) -> None:
    path.write_bytes((10 * 10**9).to_bytes(8, "little") + b"{}")


def tensor_of_10_gb(path: Path) -> None:
    name = "base_model.model.layers.0.self_attn.q_proj.lora_A.weight"
    entry = {"dtype": "F32", "shape": [1, 25 * 10**8], "data_offsets": [0, 10**10]}
    header = json.dumps({name: entry, "latents.mean": entry, "latents.std": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def expanded_tensors(path: Path) -> None:
    """A few bytes that claim to be 40 GB each."""
    large = torch.zeros(1, 1).expand(10**9, 10)
    torch.save({"target_latents": large, "encoder_hidden_states": large, "encoder_attention_mask": large[:, 0]}, path)


def packed_pt(path: Path) -> None:
    """An archive of a few kilobytes that unpacks to a gigabyte."""
    import zipfile

    torch.save({"target_latents": torch.zeros(8, 10)}, path)
    with zipfile.ZipFile(path) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in parts.items():
            packed.writestr(name, bytes(1 << 28) if name.endswith("data/0") else data)


def deep_json(path: Path) -> None:
    path.write_text("[" * 10**6, encoding="utf-8")


BOMBS = {
    "YAML": (yaml_bomb, lambda path: read_pattern(str(path)), AdapterError),
    "adapter's header": (header_of_10_gb, read, AdapterError),
    "adapter's tensor": (tensor_of_10_gb, read, AdapterError),
    "entry's header": (header_of_10_gb, Entry.open, None),
    "entry's tensor": (tensor_of_10_gb, Entry.open, None),
    "expanded tensors": (expanded_tensors, lambda path: read_upstream(path, 10), CacheError),
    "packed archive": (packed_pt, lambda path: read_upstream(path, 10), CacheError),
    "deep JSON": (deep_json, read_dataset_json, UserError),
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_with_large_claims_take_no_memory(name, tmp_path):
    make, use, error = BOMBS[name]
    path = tmp_path / "bomb.safetensors"
    make(path)
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if error is None:
        assert use(path) is None
    else:
        with pytest.raises(error) as caught:
            use(path)
        assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_links_that_lead_in_circles_end(hostile):
    found = scan(hostile)
    reasons = {path.name: reason for path, reason in found.problems}
    assert "not followed" in reasons["loop"] and "not followed" in reasons["precious"]
    assert "broken link" in reasons["me.wav"] and "not a regular file" in reasons["zero.wav"]
    assert {"song_0.wav", "song_1.wav"} <= {track.path.name for track in found.tracks}
    [big] = [track for track in found.tracks if track.path.name == "song_0.wav"]
    assert any("larger than" in problem for problem in big.problems) and big.caption == "fine"


# ---------------------------------------------------------------- files that take for ever


def far_too_many_lines(song: Path) -> None:
    song.with_suffix(".lrc").write_text("".join(f"[00:{i % 60:02d}.00]b{i}\n" for i in range(60_000)))


def one_line_that_is_sung_two_hundred_thousand_times(song: Path) -> None:
    song.with_suffix(".lrc").write_text("[0:1]" * 200_000 + "a")


def a_header_without_an_end(song: Path) -> None:
    song.with_suffix(".lrc").write_text("[la:" * 50_000 + " " * 500_000)


def a_device(song: Path) -> None:
    song.with_suffix(".json").symlink_to("/dev/zero")


def a_pipe(song: Path) -> None:
    os.mkfifo(song.with_suffix(".json"))


def a_folder(song: Path) -> None:
    song.with_suffix(".json").mkdir()


def a_sidecar_of_4_gb(song: Path) -> None:
    for suffix in (".json", ".lyrics.json"):
        with song.with_suffix(suffix).open("wb") as file:
            file.truncate(4 << 30)


ENDLESS = [far_too_many_lines, one_line_that_is_sung_two_hundred_thousand_times, a_header_without_an_end]
ENDLESS += [a_device, a_pipe, a_folder, a_sidecar_of_4_gb]


def test_annotating_beside_endless_files_ends(tmp_path):
    """In a process of its own, with 2 GB of memory and two minutes of the processor."""
    [good] = write_songs(tmp_path, 8000, count=1)
    for make in ENDLESS:
        song = shutil.copy(good, tmp_path / f"{make.__name__}.wav")
        song.with_suffix(".lyrics.txt").write_text("a\n" * 20_000)
        make(song)
    good.with_suffix(".lrc").write_text("[00:00.10]la\n[00:00.50]lo\n")
    done = subprocess.run(
        [sys.executable, "-c", ANNOTATE, str(tmp_path)], cwd=cli.ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert good.with_suffix(".lyrics.json").is_file()
