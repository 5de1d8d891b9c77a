"""Every module imports, and what an installation lacks is named with the extra that brings it.

CI runs this with the oldest packages that pyproject.toml allows and with the newest. A package is hidden as if it had
never been installed: neither an import nor a search finds it.
"""

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import acestep_lora
from acestep_lora import cli

HERE = Path(__file__).parent
SEEKER = """
import importlib.machinery, os, runpy, sys
find = importlib.machinery.PathFinder.find_spec
def seek(name, path=None, target=None):
    return None if name in os.environ["HIDDEN"].split() else find(name, path, target)
importlib.machinery.PathFinder.find_spec = seek
sys.argv = sys.argv[1:]
sys.path.insert(0, os.getcwd())
runpy.run_path(sys.argv[0], run_name="__main__") if sys.argv[0].endswith(".py") else runpy.run_module(
    sys.argv[0], run_name="__main__", alter_sys=True
)
"""


def test_every_module_imports():
    names = [module.name for module in pkgutil.walk_packages(acestep_lora.__path__, "acestep_lora.")]
    scripts = ["train", "preprocess", "annotate", "generate"]
    for name in [name for name in names if not name.endswith("__main__")] + scripts:
        importlib.import_module(name)
    assert len(names) > 50


def test_every_dependency_has_a_lower_bound_and_every_extra_is_named_somewhere():
    project = tomllib.loads((cli.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *(line for lines in extras.values() for line in lines)]:
        assert re.match(r"[\w.-]+(\[.+\])?>=\d|acestep-lora\[", requirement), requirement
    code = "".join(path.read_text(encoding="utf-8") for path in cli.ROOT.glob("acestep_lora/**/*.py"))
    assert {extra for extra in extras if f"acestep-lora[{extra}]" in code} == set(extras) - {"browser", "dev", "fuzz"}


def told(hidden: str, command: str, *arguments: str) -> str:
    """What a command prints where packages are not installed."""
    environment = os.environ | {"HIDDEN": hidden, "OPENAI_API_KEY": "x", "GEMINI_API_KEY": "x", "PYTHONUTF8": "1"}
    environment |= {"ELEVENLABS_API_KEY": "x", "HYDRA_FULL_ERROR": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SEEKER, command, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cli.ROOT,
        env=environment,
        timeout=300,
    )
    assert done.returncode in (1, cli.LEFT_OUT) and "Traceback" not in done.stderr, done.stderr
    return " ".join((done.stdout + done.stderr).replace("│", " ").split())  # a table may break a sentence


@pytest.fixture(scope="module")
def song(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("songs")
    shutil.copy(HERE / "bad_audio/aac.m4a", folder / "song.m4a")
    shutil.copy(HERE / "bad_audio/ok.mp3", folder / "good.mp3")
    return f"dataset.dir={folder}"


def test_a_logger_that_is_not_installed(tmp_path):
    said = told("tensorboard", "train.py", "logger=tensorboard", f"output_dir={tmp_path / 'out'}")
    assert said.endswith('error: logger=tensorboard needs tensorboard: pip install "acestep-lora[tensorboard]".')


CASES = {
    "formats": ("av", "preprocess.py"),
    "lufs": ("pyloudnorm", "preprocess.py", "dataset.normalize=lufs"),
    "annotate": ("openai", "annotate.py", "captioner=openai"),
    "annotate by Gemini": ("google.genai", "annotate.py", "captioner=gemini"),
    "annotate by ElevenLabs": ("elevenlabs", "annotate.py", "transcriber=elevenlabs"),
    "studio": ("gradio", "acestep_lora.studio"),
    "studio's server": ("uvicorn", "acestep_lora.studio"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_extra_that_is_not_installed_is_named(case, song):
    hidden, command, *arguments = CASES[case]
    extra = re.match(r"\w+", case)[0]
    assert f'pip install "acestep-lora[{extra}]"' in told(hidden, command, song, "hardware=cpu", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["optimizer=adamw8bit", "model.quantize=nf4"])
def test_bitsandbytes_which_macs_lack(argument, tmp_path):
    said = told("bitsandbytes", "train.py", argument, f"output_dir={tmp_path / 'out'}")
    assert re.search(r"error: .*bitsandbytes(, which this installation lacks| is not installed)", said)
