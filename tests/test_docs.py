"""README and docs: every command in them is read and composes, every option exists, and each verb runs for real."""

import ast
import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from guides import (
    ELSEWHERE,
    GUIDES,
    SCRIPT,
    code_blocks,
    commands,
    composed,
    fenced,
    on_nano,
    source,
    spans,
    text,
    typed,
)
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file

from acestep_lora import cli

NO_OPTIONS = {"adapter=hra", "adapter=mine", "adapter=lokrr", "key=value"}  # examples
NO_OPTIONS |= {"weights_only=True", "torch_dtype=torch.bfloat16"}  # Python
OVERRIDE = re.compile(r"[a-z_.]+=(?!\.\.\.)\S+")
USED = {
    f"{name} {' '.join(arguments)}": (name, arguments)
    for guide in GUIDES
    for name, arguments in commands(code_blocks(guide) + spans(guide))
}
TYPED = {
    f"{name} {' '.join(arguments)}": (name, arguments) for guide in GUIDES for name, arguments in commands(typed(guide))
}
by_name = {"argvalues": GUIDES, "ids": lambda guide: guide.name}


# ---------------------------------------------------------------- read and composed


@pytest.mark.parametrize("name, arguments", USED.values(), ids=USED)
def test_every_command_in_the_guides_composes(configure, name, arguments):
    if "--config-dir" not in arguments:  # a folder of the reader's
        for command, overrides in composed(name, arguments):
            configure(command, *overrides)


@pytest.mark.parametrize("guide", **by_name)
def test_what_is_typed_into_a_terminal_is_understood(guide):
    """Every line of a shell is ours, and composed above, or that of a known program whose arguments exist here."""
    lines = typed(guide)
    subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, check=True)
    project = tomllib.loads((cli.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    published = {repo for file in cli.CONF.rglob("*.yaml") for repo in re.findall(r"ACE-Step/[\w.-]+", text(file))}
    for line in lines:
        assert SCRIPT.search(line) or not re.search(r"acestep_lora|(^|\s)(train|generate|annotate)\b", line), line
        for extras in re.findall(r"\[([\w,]+)\]", line) if "pip install" in line else []:
            assert project["optional-dependencies"].keys() >= set(extras.split(",")), line
        if repo := re.search(r"hf download (\S+)", line):
            assert repo[1] in published, line
        for file in re.findall(r"(?<![\w./-])(?:tests|docs|data)/[\w/.-]+", line):
            assert (cli.ROOT / file).exists(), line


@pytest.mark.parametrize("guide", **by_name)
def test_other_blocks_are_what_their_fence_says(guide):
    for body in fenced(guide, "python"):
        ast.parse(body)
    for body in fenced(guide, "yaml"):
        assert isinstance(yaml.safe_load(body), dict)
    for body in fenced(guide, "json"):
        json.loads(body)


def keys(node: object, above: str = "") -> set[str]:
    """Every dotted key of a YAML file."""
    below = node.items() if isinstance(node, dict) else []
    return {above.rstrip(".")} | {key for name, child in below for key in keys(child, f"{above}{name}.")}


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every key of conf/, and `group=option` for every file in it."""
    found = set()
    for file in cli.CONF.rglob("*.yaml"):
        group = ".".join(file.parent.relative_to(cli.CONF).parts)
        found |= {f"{group}={file.stem}"} | keys(
            yaml.safe_load(file.read_text(encoding="utf-8")), f"{group}.".lstrip(".")
        )
    return found


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_every_option_in_the_guides_exists(known, guide):
    """Those between backquotes, of some command or other."""
    options = {span for span in spans(guide) if OVERRIDE.fullmatch(span)} - NO_OPTIONS
    groups = {key.partition("=")[0] for key in known if "=" in key}
    for option in options:
        key, _, value = option.partition("=")
        chosen = [f"{key}={name}" for name in value.strip("[]").split(",")]
        assert known.issuperset(chosen) if key in groups else key in known, option


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_links_lead_somewhere(guide):
    for target in re.findall(r"\]\(([^)#\s]+)", text(guide)):
        assert target.startswith("https://") or (guide.parent / target).exists(), target


def test_every_python_file_is_in_the_readmes_tree():
    readme = text(cli.ROOT / "README.md")
    files = [*cli.ROOT.glob("*.py"), *(cli.ROOT / "acestep_lora").rglob("*.py")]
    assert [file.name for file in files if f" {file.name} " not in readme and not file.stem.startswith("__")] == []


# ---------------------------------------------------------------- what is made from something else


@pytest.fixture(scope="module")
def settings():
    """docs/make_settings.py as a module."""
    sys.path.insert(0, str(cli.ROOT / "docs"))
    import make_settings

    return make_settings


def test_the_settings_page_is_what_the_yaml_files_say(settings):
    page = (cli.ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert page == settings.make(), "run python docs/make_settings.py"


def test_every_setting_says_what_it_does_and_when_to_change_it(settings):
    rows = [line for line in settings.make().splitlines() if line.startswith("| `") and line.count(" | ") >= 3]
    assert len(rows) > 150
    for row in rows:
        key, default, what, when = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1])
        assert default and what and when, f"{key} needs a comment '# what it does | when to change it'"


def test_comments_of_yaml_files_are_found(settings, tmp_path):
    file = tmp_path / "x.yaml"
    lines = ["a: 'it # is'  # an LM's codes | never", "b:", "  c: 1  # one", "     #   and two | likewise", "d: 2"]
    file.write_text("\n".join(lines), encoding="utf-8")
    assert settings.comments(file) == {"a": "an LM's codes | never", "b": "", "b.c": "one and two | likewise", "d": ""}


def test_the_table_of_timesteps_is_right(configure):
    u = (torch.arange(20000) + 0.5) / 20000
    rows = re.findall(
        r"^\| `(\w+)`.*? \| ([\d.]+) \| (\d+) % \| (\d+) % \|$", text(cli.ROOT / "docs/timesteps.md"), re.M
    )
    assert {name for name, *_ in rows} == {file.stem for file in (cli.CONF / "timesteps").glob("*.yaml")}
    for name, *told in rows:
        t = instantiate(configure("train", f"timesteps={name}").timesteps)(u)
        found = [t.mean(), 100 * (t > 0.9).float().mean(), 100 * (t < 0.3).float().mean()]
        assert [f"{found[0]:.2f}", *(f"{share:.0f}" for share in found[1:])] == told


def test_the_dockerfile_copies_and_runs_what_is_there():
    lines = (cli.ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied and all((cli.ROOT / file).exists() for file in copied)
    assert all((cli.ROOT / file).exists() for line in lines for file in re.findall(r"/app/([\w.]+)", line))
    project = tomllib.loads((cli.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [extras] = [found for line in lines for found in re.findall(r"\.\[([\w,]+)\]", line)]
    assert project["optional-dependencies"].keys() >= set(extras.split(","))


# ---------------------------------------------------------------- for real, on nano and the CPU


@pytest.fixture(scope="module")
def home(tmp_path_factory, run) -> Path:
    """A folder to type commands in: five short songs, a trained adapter, words to sing."""
    folder = tmp_path_factory.mktemp("typed")
    songs = folder / "songs"
    songs.mkdir()
    for file in sorted((cli.ROOT / "data/demo").glob("[glm]*.*")):
        shutil.copy(file, songs)
    (folder / "song.txt").write_text("[Verse 1]\nLanterns on the water\n", encoding="utf-8")
    shutil.copy(folder / "song.txt", folder / "words.txt")
    run("trainer.max_steps=2", "trainer.accumulate_grad_batches=1", folder=folder / "trained")
    shutil.copytree(folder / "trained", folder / "trained_too")
    shutil.copytree(cli.ROOT / "data/models/nano", folder / "tuned")
    [weights] = (folder / "tuned/transformer").glob("*.safetensors")
    state = load_file(weights)
    state["layers.1.mlp.up_proj.weight"] *= 1.1
    save_file(state, weights)
    return folder


@pytest.fixture
def perform(home, monkeypatch, capsys):
    """perform("train", arguments) -> (exit code, what it printed), typed in `home`, run as by a process of its own."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def go(name: str, arguments: list[str]) -> tuple[int, str]:
        given = on_nano(name, arguments, home)
        monkeypatch.setattr(sys, "argv", [name, *given])
        script = cli.ROOT / f"{name}.py"
        with pytest.raises(SystemExit) as end:
            if script.is_file():
                runpy.run_path(str(script), run_name="__main__")
            else:
                runpy.run_module(f"acestep_lora.{name}", run_name="__main__", alter_sys=True)
        out, err = capsys.readouterr()
        return end.value.code, out + err

    monkeypatch.chdir(home)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    yield go
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def runs_here(name: str, arguments: list[str]) -> bool:
    return name != "studio" and ("dry_run=true" in arguments or not any(map(ELSEWHERE.fullmatch, arguments)))


VERBS = {name: (name, words) for name, words in reversed(TYPED.values()) if runs_here(name, words)}
"""The first command of each verb that can be tried here."""


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the module is there already, and is run anew
@pytest.mark.parametrize("name, arguments", VERBS.values(), ids=VERBS)
def test_one_of_each_verb_runs(perform, name, arguments):
    code, told = perform(name, arguments)
    assert code == 0, told


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name, arguments", TYPED.values(), ids=TYPED)
def test_every_command_runs(home, perform, name, arguments):
    if not runs_here(name, arguments):
        pytest.skip("a service, a model to be downloaded, or several devices")
    for folder in (home / "runs").glob("mine*"):  # several guides train into the same
        shutil.rmtree(folder)
    code, told = perform(name, arguments)
    assert code == 0, told


def test_the_studio_opens(home):
    command = [sys.executable, "-m", "acestep_lora.studio", f"dataset.dir={home / 'songs'}", "port=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    studio = subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        with urllib.request.urlopen(studio.stdout.readline().split()[1], timeout=60) as page:
            assert "gradio" in page.read().decode()
    finally:
        studio.terminate()
        studio.communicate()


def test_every_verb_there_is_is_shown_and_run():
    modules = [path for path in (cli.ROOT / "acestep_lora").rglob("*.py") if 'cli.main("' in path.read_text("utf-8")]
    verbs = {path.parent.name if path.stem == "__main__" else path.stem for path in modules}
    verbs |= {path.stem for path in cli.ROOT.glob("*.py")}
    assert verbs - {"studio"} == VERBS.keys()
    assert {source(name) for name in verbs} >= set(modules)
