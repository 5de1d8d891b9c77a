"""Typed text survives Hydra: grammar, sweeps, composition and OmegaConf's interpolation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import assume, example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from acestep_lora.overrides import FREE_TEXT, PATHS, PROSE, quote_overrides

PARSER = OverridesParser.create()
CONFIG = "seed: 1\n" + "".join(f"{key}: null\n" for key in ("prompt", "lyrics", "resume", "output_dir", "name"))
CONFIG += "dataset: {dir: null, json: null, custom_tag: null}\nadapter: {path: null, rank_pattern: null}\n"

NAMES = [
    "lofi, warm piano",
    "song's text (v2).txt",
    "@song's text (v2).txt",
    "/音楽",
    "/音楽/私の曲, その2/",
    "Sigur Rós – ( )",
    "AC/DC",
    "!!!",
    "???!",
    "100%",
    "50% off, 2 for 1",
    "#1 hits",
    "~/Music/My Songs",
    "~",
    "C:\\Users\\me\\My Music\\",
    "C:\\",
    "\\\\server\\share\\a'b\\",
    "\\",
    "\\\\",
    "\\'",
    "a\\'b\\\"c\\",
    "D:/a=b/c",
    "key=value",
    "a=b=c",
    "=",
    "x: y",
    "16:9",
    "{draft}",
    "a{b",
    "a}b",
    "[2019] Best of",
    "Best of [2019",
    "]",
    "(live)",
    "choice(a,b)",
    "range(1,5)",
    "glob(*)",
    "a,b",
    "a,b,",
    ",",
    "it's",
    "'til dawn",
    "rock'n'roll'",
    '"quoted" word',
    "'a' and 'b'",
    "'",
    '"',
    "''\"",
    "$HOME/music",
    "$",
    "cost: $5, ${ five",
    "a ${} b",
    "US$ {x}",
    "\\$",
    " leading and trailing ",
    "",
    " ",
    "tab\tand\nnew line",
    "NULL",
    "Null",
    "true",
    "no",
    "1e-4",
    "007",
    "inf",
    "-5",
    "-m",
    "--multirun",
    "+x",
    "~x",
    "a@b",
    "a;b|c&d<e>`f`",
    "*?^%",
    "🎹🎶",
    "é",
    "e\u0301",
    "עברית",
    "nul\u2028line",
    "F# minor",
    "D♭ major",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conf")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    with initialize_config_dir(str(folder), version_base=None):
        yield lambda *argv: compose("config", quote_overrides(list(argv)))


def value(argument: str, *flags: str):
    """What Hydra and OmegaConf make of one typed argument, without the cost of composing."""
    [override] = PARSER.parse_overrides(quote_overrides([*flags, argument])[len(flags) :])
    assert not override.is_sweep_override(), argument
    return OmegaConf.create({"value": override.value()}).value


def sweep(argument: str) -> list:
    [override] = PARSER.parse_overrides(quote_overrides(["-m", argument])[1:])
    assert override.is_sweep_override(), argument
    return [PARSER.parse_override(f"x={element}").value() for element in override.sweep_string_iterator()]


def test_names_are_many_and_hydra_alone_fails_on_most():
    assert len(set(NAMES)) == len(NAMES) >= 50
    failures = 0
    for name in NAMES:
        try:
            failures += PARSER.parse_override(f"prompt={name}").value() != name
        except HydraException:
            failures += 1
    assert failures > 40


@pytest.mark.parametrize("name", NAMES)
def test_hostile_name_is_parsed_as_typed(name):
    assert value(f"prompt={name}") == value(f"dataset.dir={name}") == value(f"~dataset.dir={name}") == name


def test_hostile_names_are_composed_as_typed(config):
    for name, other in zip(NAMES[::2], NAMES[1::2], strict=True):
        cfg = config(f"prompt={name}", f"dataset.dir={name}", f"+adapter.init_from={other}", f"lyrics={other}")
        assert (cfg.prompt, cfg.dataset.dir, cfg.adapter.init_from, cfg.lyrics) == (name, name, other, other)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_name_is_one_value_in_multirun(name):
    sweeps = name in ("choice(a,b)", "range(1,5)", "glob(*)")
    if not sweeps:
        assert value(f"prompt={name}", "-m") == name
        assert value(f"lyrics=[Verse],[Chorus] {name},[Outro]", "-m") == f"[Verse],[Chorus] {name},[Outro]"
    if not sweeps and ("," not in name or ", " in name):
        assert value(f"dataset.dir={name}", "-m") == name


@given(st.text(st.characters(exclude_categories=["C"])) | st.text("ab '\"\\${}[](),=:", max_size=12))
@example("${oc.env:HOME}")
@example("\\${x}\\\\${y}\\")
def test_any_prose_is_kept(text):
    assume(text not in ("null", "???"))
    assume(not (len(text) > 1 and text[0] == text[-1] and text[0] in "'\""))
    assert value(f"prompt={text}") == text
    assert value(f"lyrics=[Verse 1]\n{text}\r\n[Chorus]") == f"[Verse 1]\n{text}\r\n[Chorus]"


@given(st.lists(st.text("ab '\"\\$[]()=音.", max_size=6), max_size=4))
def test_any_list_of_paths_is_kept(names):
    paths = [f"/{name}/" for name in names]
    assert value(f"dataset.dir=[{','.join(paths)}]") == paths
    assert value(f"dataset.dir=[ {' , '.join(paths)} ]") == paths


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("prompt=null", None),
        ("resume=null", None),
        ("prompt='lofi, piano'", "lofi, piano"),
        ('prompt="it\'s"', "it's"),
        ("prompt='it\\'s'", "it's"),
        ("prompt='C:\\\\'", "C:\\"),
        ("lyrics=[Instrumental]", "[Instrumental]"),
        ("lyrics={x: y}", "{x: y}"),
        ("prompt=${seed}", "${seed}"),
        ("dataset.dir=[/a b,/音楽]", ["/a b", "/音楽"]),
        ("dataset.dir=['/a, b', /it's ,null,007]", ["/a, b", "/it's", None, "007"]),
        ("dataset.dir=[C:\\a\\,'C:\\\\b c']", ["C:\\a\\", "C:\\\\b c"]),
        ("dataset.dir=[/a [live],/b]", ["/a [live]", "/b"]),
        ("dataset.dir=[]", []),
        ("dataset.dir=[{path: /a, repeat: 2}]", [{"path": "/a", "repeat": 2}]),
        ("adapter.rank_pattern={q_proj: 8, v_proj: 16}", {"q_proj": 8, "v_proj": 16}),
        ("adapter.rank_pattern={}", {}),
    ],
)
def test_hydra_syntax_plainly_meant_is_kept(argument, expected):
    assert value(argument) == expected


@pytest.mark.parametrize(
    "argument", ["seed=1,2", "adapter=lora", "-m", "--config-name=音楽", "optimizer.lr=1e-4,3e-4", "prompt", "~prompt"]
)
def test_other_arguments_are_untouched(argument):
    assert quote_overrides([argument]) == [argument]


@pytest.mark.parametrize("prefix", ["", "+", "++", "~"])
def test_prefixes_and_packages(prefix):
    override = PARSER.parse_override(*quote_overrides([f"{prefix}prompt@here=lofi, piano"]))
    assert (override.key_or_group, override.package, override.value()) == ("prompt", "here", "lofi, piano")


def test_interpolation_in_paths(config, monkeypatch):
    monkeypatch.setenv("MUSIC", "my, music")
    cfg = config(
        "name=demo",
        "dataset.dir=/${oc.env:MUSIC}/it's $5 ${",
        "dataset.json=C:\\${name}\\${oc.env:MUSIC}\\",
        "output_dir=${oc.env:NONE,${name}}",
        "adapter.path=[/${name},/b]",
    )
    assert cfg.dataset.dir == "/my, music/it's $5 ${"
    assert cfg.dataset.json == "C:\\demo\\my, music\\"
    assert cfg.output_dir == "demo"
    assert list(cfg.adapter.path) == ["/demo", "/b"]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("dataset.dir=/a,/音楽 x", ["/a", "/音楽 x"]),
        ("adapter.path=C:\\a\\,'/b, c'", None),
        ("adapter.path=C:\\a\\,'/b,c',null", ["C:\\a\\", "/b,c", None]),
        ("dataset.dir=choice(/a b, /音楽,'/c, d')", ["/a b", "/音楽", "/c, d"]),
        ("prompt=choice('lofi, piano',it's rock)", ["lofi, piano", "it's rock"]),
        ("dataset.dir=[/a,/b],[/c]", [["/a", "/b"], ["/c"]]),
        ("name=range(1,3)", [1, 2]),
        ("name=shuffle(x,x)", ["x", "x"]),
    ],
)
def test_sweeps_plainly_meant(argument, expected):
    if expected is None:  # a space after a comma: one name
        assert value(argument, "-m") == argument.partition("=")[2]
    else:
        assert sweep(argument) == expected


@pytest.mark.parametrize("flag", ["-m", "--multirun", "hydra.mode=MULTIRUN"])
def test_comma_list_sweeps_only_in_multirun(flag):
    assert quote_overrides(["name=a,b", flag]) == ["name='a','b'", flag]
    assert quote_overrides(["name=a,b"]) == ["name='a,b'"]
    assert quote_overrides(["prompt=a,b", flag]) == ["prompt='a,b'", flag]


def test_real_multirun(tmp_path):
    """The sweeper writes each job's overrides anew; what arrives is still what was typed."""
    script = tmp_path / "app.py"
    script.write_text(
        "import json, sys, hydra\n"
        "from acestep_lora.overrides import quote_overrides\n"
        "@hydra.main(config_path='.', config_name='config', version_base=None)\n"
        "def main(cfg):\n"
        "    print(json.dumps([cfg.prompt, cfg.dataset.dir]))\n"
        "sys.argv[1:] = quote_overrides(sys.argv[1:])\n"
        "main()\n",
        encoding="utf-8",
    )
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    typed = ["prompt=it's ${x}, \\'lo-fi' (音楽)\\", "dataset.dir=/a's b\\,/音楽", f"hydra.sweep.dir={tmp_path}/r, ü's"]
    run = subprocess.run(
        [sys.executable, str(script), "-m", *typed],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": ".", "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stderr
    prompt = typed[0].partition("=")[2]
    jobs = [line for line in run.stdout.splitlines() if line.startswith('["it')]
    assert [json.loads(job) for job in jobs] == [[prompt, "/a's b\\"], [prompt, "/音楽"]]
    assert (tmp_path / "r, ü's").is_dir()


def test_keys():
    assert not PROSE & PATHS and FREE_TEXT == PROSE | PATHS
