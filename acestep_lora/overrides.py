"""Quote free text on the command line, so that Hydra's grammar gives back what was typed.

    prompt=lofi, warm piano    dataset.dir=/音楽    lyrics=@song's text (v2).txt    output_dir=C:\\runs\\

Hydra fails on each of these, or splits it. For the keys below the value is quoted, except where Hydra's syntax is
plainly meant:

1. `null`, and a value that is one quoted string from end to end (`'a, b'`);
2. in a path: a list `[a b,/音楽]` (each element is quoted), a mapping `{a: b}` and an interpolation `${...}`;
3. with -m: `choice(a b,/音楽)` (each element is quoted) and Hydra's other sweep functions; in a path also a comma list
   `/a,/b`, unless a space follows one of its commas.

A comma inside an element needs quotes: `['/a, b',/c]`. OmegaConf's `???` cannot be text.
"""

import re

from hydra.core.override_parser.types import Quote, QuotedString

# Prose may contain anything, brackets and `${` included: `lyrics=[Instrumental]` is not a list.
PROSE = frozenset(
    """
    prompt negative_prompt lyrics keyscale dataset.custom_tag transcriber.prompt structure.prompt captioner.prompt
    description
    """.split()
)
PATHS = frozenset(
    """
    dataset.dir dataset.json dataset.cache_dir model.path model.parts_path adapter.path adapter.init_from
    adapter.rank_pattern output_dir output input resume runs name against measured hydra.run.dir hydra.sweep.dir
    preservation.prompts tuned clap transcriber.model transcriber.service.model captioner.service.model captioner.path
    captioner.base report save
    """.split()
)
FREE_TEXT = PROSE | PATHS

_MULTIRUN = {"-m", "--multirun", "hydra.mode=MULTIRUN"}
_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_AS_TYPED = re.compile(rf"null|{_QUOTED}", re.DOTALL)
_STRUCTURE = re.compile(r"\{\}|\{.*:.*\}|\[\s*[\[{].*\]", re.DOTALL)  # mappings, and lists of lists or mappings
_SWEEP = re.compile(r"(?:range|interval|glob|sort|shuffle)\(.*\)", re.DOTALL)
_CHOICE = re.compile(r"choice\((.*)\)", re.DOTALL)
_ELEMENT = re.compile(rf"(?:{_QUOTED})(?=\s*(?:,|\Z))|[^\s,][^,]*", re.DOTALL)
_INTERPOLATION = re.compile(r"(\\*)\$\{(?=([^}]+\})?)")


def quote_overrides(argv: list[str]) -> list[str]:
    """`argv` (without the program's name) with the values of FREE_TEXT keys quoted by the rules above."""
    multirun = not _MULTIRUN.isdisjoint(argv)
    return [_quote_override(argument, multirun) for argument in argv]


def _quote_override(argument: str, multirun: bool) -> str:
    key, equals, value = argument.partition("=")
    name = key.lstrip("+~").partition("@")[0]
    if not equals or name not in FREE_TEXT:
        return argument
    return f"{key}={_quote_value(value, name in PATHS, multirun)}"


def _is_hydra(value: str, path: bool, multirun: bool) -> bool:
    return bool(
        _AS_TYPED.fullmatch(value)
        or (path and _STRUCTURE.fullmatch(value))
        or (multirun and _SWEEP.fullmatch(value))
        or (path and multirun and "],[" in value)
    )


def _quote_value(value: str, path: bool, multirun: bool) -> str:
    if _is_hydra(value, path, multirun):
        return value
    if path and value.startswith("[") and value.endswith("]"):
        return f"[{_quote_elements(value[1:-1], path)}]"
    # Hydra drops the quotes inside choice(), which is the same as a plain comma list.
    if multirun and (choice := _CHOICE.fullmatch(value)):
        return _quote_elements(choice[1], path)
    if multirun and path and "," in value and ", " not in value:
        return _quote_elements(value, path)
    return _quote_text(value, path)


def _quote_elements(text: str, path: bool) -> str:
    return ",".join(_quote_text(element.strip(), path) for element in _ELEMENT.findall(text))


def _quote_text(text: str, path: bool) -> str:
    if _AS_TYPED.fullmatch(text):
        return text

    def escape(match: re.Match) -> str:
        # OmegaConf halves the backslashes before `${`, and an odd one makes it text: `C:\${oc.env:X}` needs two.
        backslashes, interpolation = match.groups()
        return 2 * backslashes + ("${" if path and interpolation else r"\${")

    return QuotedString(_INTERPOLATION.sub(escape, text), Quote.single).with_quotes()
