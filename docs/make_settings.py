"""docs/settings.md from the YAML files of conf/ and their comments: python docs/make_settings.py

`key: value   # what it does | when to change it`; a comment may go on in lines of its own, indented further.
"""

import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
HEAD = """# Settings

Every setting there is: its default, what it does, when to change it. A setting is changed on the command line,
`adapter.r=32`; a group's option likewise, `adapter=dora`. `--cfg job` prints what a command would use.
[Recipes](presets.md) set several at once. This page is made from `conf/` by `python docs/make_settings.py`.
"""
TECHNICAL = re.compile(r"_\w+_|hydra|defaults|module|shape|config|components")
"""Keys that are no settings: what is instantiated, how it is wired, and a model's published sizes."""
_KEY = re.compile(r"^( *)(?:- )?([\w/.]+):(?:\s|$)(.*)$")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


def comments(file: Path) -> dict[str, str]:
    """Dotted key -> its comment."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        match = _KEY.match(line)
        if match:
            depth = len(match[1])
            path = [(at, key) for at, key in path if at < depth] + [(depth, match[2])]
            start = _QUOTED.sub(lambda quoted: "_" * len(quoted[0]), line).find(" # ")
            found[".".join(key for _, key in path)] = line[start + 3 :].strip() if start >= 0 else ""
        elif path and line.strip().startswith("# ") and len(line) - len(line.lstrip()) > path[-1][0]:
            key = ".".join(key for _, key in path)
            found[key] = f"{found[key]} {line.strip()[2:].strip()}".strip()
    return found


def leaves(node: object, above: str = "") -> dict[str, object]:
    """Dotted key -> value, without what is technical."""
    if not isinstance(node, dict):
        return {above: node}
    below = [leaves(child, f"{above}.{key}".strip(".")) for key, child in node.items() if not TECHNICAL.fullmatch(key)]
    return {key: value for each in below for key, value in each.items() if key}


def settings(file: Path) -> dict[str, object]:
    return leaves(yaml.safe_load(file.read_text(encoding="utf-8")) or {})


def about(file: Path) -> str:
    """The comment at a file's head, without the command it may show."""
    lines = file.read_text(encoding="utf-8").splitlines()
    head = []
    for line in lines[lines[:1] == ["# @package _global_"] :]:
        if not line.startswith("#") or line.startswith(("# When:", "# Memory:")):
            break
        head.append(line[1:].strip().partition("    ")[0])
    return cell(" ".join(head))


def cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def shown(value: object) -> str:
    """A default as it would be typed."""
    if isinstance(value, str) and len(value) > 60:
        return "a text"
    if isinstance(value, str) and (match := re.fullmatch(r"\$\{([\w.]+)\}", value)):
        return f"as `{match[1]}`"
    if isinstance(value, str) and (match := re.fullmatch(r"\$\{product:\$\{([\w.]+)\},\$\{([\w.]+)\}\}", value)):
        return f"`{match[1]}` x `{match[2]}`"
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) or not value else value
    return f"`{cell(text)}`"


def row(key: str, default: str, comment: str) -> str:
    what, _, when = comment.partition(" | ")
    return f"| `{key}` | {default} | {cell(what)} | {cell(when)} |"


TITLES = "| setting | default | what it does | when to change it |\n|---|---|---|---|"


def command(file: Path) -> list[str]:
    """The settings in a command's own file."""
    said, own = comments(file), settings(file)
    return [TITLES, *(row(key, shown(value), said.get(key, "")) for key, value in own.items())] if own else []


def group(folder: Path, usual: str | None) -> list[str]:
    """A group's options, then its settings: the default's value first, those of options that differ behind it."""
    files = sorted(folder.glob("*.yaml"), key=lambda file: (file.stem != usual, file.stem))
    lines = [f"| `{folder.name}=` | |", "|---|---|"]
    lines += [f"| `{file.stem}`{' (default)' * (file.stem == usual)} | {about(file)} |" for file in files]
    prefix = f"{folder.name}."
    values: dict[str, dict[str, list[str]]] = {}
    said: dict[str, str] = {}
    for file in files:
        text = {key.removeprefix(prefix): comment for key, comment in comments(file).items()}
        for key, value in settings(file).items():
            key = key.removeprefix(prefix)
            if key in ("name",):
                continue
            values.setdefault(key, {}).setdefault(shown(value), []).append(file.stem)
            said[key] = max(said.get(key, ""), text.get(key, ""), key=lambda comment: " | " in comment)
    if values:
        lines += ["", TITLES]
    for key, defaults in values.items():
        first, *others = defaults.items()
        told = [first[0]] + [f"{value} ({', '.join(f'`{name}`' for name in names)})" for value, names in others]
        lines.append(row(f"{prefix}{key}", ", ".join(told), said[key]))
    return lines


def chosen(file: Path) -> dict[str, str | None]:
    """Groups of a command -> the option it takes by itself."""
    entries = yaml.safe_load(file.read_text(encoding="utf-8"))["defaults"]
    pairs = {key: value for entry in entries if isinstance(entry, dict) for key, value in entry.items()}
    return {key: value for key, value in pairs.items() if (CONF / key).is_dir()}


def make() -> str:
    parts, shown_groups = [HEAD], set()
    files = sorted(CONF.glob("*.yaml"), key=lambda file: (file.stem != "train", file.stem))
    for file in files:
        groups = chosen(file)
        parts += [f"## {file.stem}", about(file), "\n".join(command(file))]
        known = [name for name in groups if name in shown_groups]
        if known:
            parts.append("Also the groups " + ", ".join(f"[{name}](#{name})" for name in sorted(known)) + ".")
        for name, usual in groups.items():
            if name in shown_groups or name == "experiment":
                continue
            shown_groups.add(name)
            parts += [f"### {name}", "\n".join(group(CONF / name, usual))]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/settings.md").write_text(make(), encoding="utf-8")
