"""Pages that are generated when the site is built: keys of the config, API reference, files at the top."""

import ast
import io
import itertools
import json
import tokenize
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from mixar.config import knobs
from mixar.config.knobs import Config

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
FILES = ("LICENSE", "NOTICE", "CITATION.cff")
KEYS = "<!-- keys -->"  # replaced by the keys in docs/configuration.md


def on_config(config: Any) -> None:
    """mkdocs: add the reference's pages to its entry in the navigation."""
    entry: dict[str, Any] = next(entry for entry in config.nav if "API reference" in entry)
    entry["API reference"] = [*reference()]


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: add the files at the top of the repository, and a page of reference for each room of mixar."""
    from mkdocs.structure.files import File

    made = {page: (ROOT / name).read_text() for name, page in (PAGES | {name: name for name in FILES}).items()}
    made["index.md"] = f"---\nhide: [navigation]\n---\n{made['index.md']}"
    made |= reference()
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs: insert the keys, and convert links of the repository to those of the site."""
    return markdown.replace("](docs/", "](").replace("](../", "](").replace(KEYS, key_tables())


def reference() -> dict[str, str]:
    """Pages by path, on which mkdocstrings documents every module of a room."""
    rooms: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "mixar").rglob("*.py")):
        room = path.relative_to(ROOT / "mixar").parts[0].removesuffix(".py")
        if not room.startswith("__"):
            rooms.setdefault(room, []).append(path)
    listed = "\n".join(f"- [mixar.{room}]({room}.md): {summary(paths[0])}" for room, paths in rooms.items())
    pages = {"reference/index.md": f"# API reference\n\nEvery public name, from its docstring.\n\n{listed}\n"}
    return pages | {
        f"reference/{room}.md": "\n\n".join([f"# mixar.{room}", module(paths[0], False), *map(module, paths[1:])])
        for room, paths in rooms.items()
    }


def module(path: Path, heading: bool = True) -> str:
    """The directive of mkdocstrings for a module, for the names that it defines, not those that it imports."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    defined = [
        node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef | ast.FunctionDef)
    ]
    public = [name for name in defined if not name.startswith("_")]
    return f"::: {name}\n    options: {json.dumps({'members': public, 'show_root_heading': heading})}"


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")


def key_tables() -> str:
    """Every key of the config in tables, one per section."""
    parts = [table("", Config)]
    for section, kind in typing.get_type_hints(Config).items():
        if is_dataclass(kind):
            parts.append(f"## {section}\n\n{kind.__doc__}\n\n{table(f'{section}.', kind)}")
    return "\n\n".join(parts)


def table(prefix: str, section: Any) -> str:
    """The keys of one section: name, default, allowed values, and the comment beside or above the field."""
    notes = dict(comments(section))
    rows = [
        f"| `{prefix}{field.name}` | {default(field)} | {allowed(field)} | {notes.get(field.name, '')} |"
        for field in fields(section)
        if not is_dataclass(field.type)
    ]
    return "\n".join(["| key | default | allowed | meaning |", "|---|---|---|---|", *rows])


def default(field: Field[Any]) -> str:
    """A default as it is typed, or the key that it follows."""
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if isinstance(value, str) and value.startswith("${"):
        return f"that of `{value[2:-1]}`"
    if value == knobs.MISSING:
        return "follows"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def allowed(field: Field[Any]) -> str:
    """The choices, the range, or the kind of value."""
    if choices := field.metadata.get("choices"):
        return ", ".join(f"`{choice}`" for choice in choices)
    if limits := field.metadata.get("limits"):
        return " to ".join(f"{limit:,}" if isinstance(limit, int) else f"{limit:g}" for limit in limits)
    return {bool: "`true`, `false`", int: "whole number"}.get(typing.cast(Any, field.type), "text")


def comments(section: Any) -> Iterator[tuple[str, str]]:
    """The comment beside each field of a dataclass in knobs.py, or in the lines above it."""
    text = Path(knobs.__file__).read_text()
    notes = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    alone = {line for line in notes if text.splitlines()[line - 1].lstrip().startswith("#")}
    names = [kind.__name__ for kind in section.__mro__]  # with those that it inherits fields from
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name in names]
    for node in itertools.chain.from_iterable(found.body for found in classes):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            note = " ".join(notes[n] for n in range(first, (node.end_lineno or first) + 1) if n in notes)
            yield node.target.id, note.replace("|", "\\|")
