"""The README and the pages of docs as data: their fences of code, the commands they show, and the parts that are generated.

Invariant: a page is read as it stands; nothing is corrected on the way.  A fence that must not run has the comment
``<!-- not-run: reason -->`` on the line before it.

    python -m tests.support.pages        writes the generated parts anew: options, modules, compiled programs
"""

import ast
import contextlib
import dataclasses
import functools
import html
import importlib
import io
import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.memory import compiled_ahead, meshes_ahead
from sora_jax.commands import options_table
from sora_jax.commands.main import main as sora_jax_main
from tests.test_walls import ORDER

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(
    r"^(?:<!-- not-run: (?P<reason>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
_HANDS_OVER = {"sora_jax.metrics": "sora_jax.commands.compare"}  # modules that are a command when they are run
_COMMAND = re.compile(r"`(python -m [^`\n]+)`")
_OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fence:
    """A block of code on a page.

    Attributes:
      page: the page's file.
      line: line number of the first line of code.
      language: ``python``, ``sh``, ``text`` and so on; empty where the page says none.
      code: the lines, each with its end.
      not_run: why it must not run; None: it runs.
      output: what it prints, where a fence of text follows it directly; else None.
    """

    page: Path
    line: int
    language: str
    code: str
    not_run: str | None
    output: str | None = None

    @property
    def place(self) -> str:
        """File and line, for a message."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a fence of sh, split into words; comments and line continuations are the shell's."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def fences(page: Path) -> list[Fence]:
    """Returns the fences of a page, each with its output."""
    text = page.read_text(encoding="utf-8")
    matches = list(_FENCE.finditer(text))
    found = []
    for match, following in itertools.zip_longest(matches, matches[1:]):
        output = None
        if following is not None and following["language"] == "text" and not text[match.end() : following.start()].strip():
            output = following["code"]
        found.append(
            Fence(
                page=page,
                line=text.count("\n", 0, match.start("code")) + 1,
                language=match["language"],
                code=match["code"],
                not_run=match["reason"],
                output=output,
            )
        )
    return found


def module_commands(text: str) -> list[list[str]]:
    """Returns the commands ``python -m MODULE ...`` that stand in backquotes in a text, split into words."""
    return [shlex.split(command) for command in _COMMAND.findall(text)]


def options_of_module(name: str) -> set[str]:
    """Returns the options of ``python -m NAME``: from its help, or from the source of a benchmark and what it shares."""
    name = _HANDS_OVER.get(name, name)
    if name.startswith("sora_jax."):
        return set(_OPTION.findall(help_text(importlib.import_module(name).main)))
    path = ROOT / Path(*name.split("."))
    tree = _parsed(path / "__main__.py" if path.is_dir() else path.with_suffix(".py"))
    declared = {"-h", "--help"} | _declared_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks"):
            module = ROOT / Path(*(node.module or "").split("."))
            sources = [each.with_suffix(".py") for each in (module, *(module / each.name for each in node.names))]
            for shared in map(_parsed, filter(Path.is_file, sources)):
                functions = [each for each in shared.body if isinstance(each, ast.FunctionDef)]
                declared |= set().union(*(_declared_in(each) for each in functions if each.name not in ("main", "parse")))
    return declared


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _declared_in(tree: ast.AST) -> set[str]:
    """Returns the options that calls of ``add_argument`` below a node name."""
    declared: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            words = [word.value for word in node.args if isinstance(word, ast.Constant)]
            declared |= {word for word in words if str(word).startswith("-")}
    return declared


@functools.cache
def help_text(main: Callable[[list[str]], int | None], *command: str) -> str:
    """Returns what a command prints for ``--help``, in lines that are not broken."""
    printed = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*command, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return printed.getvalue()


def _cell(text: str) -> str:
    """Returns a text for a cell of a table; a bar in backquotes would be the end of the cell for one of the two renderers."""
    return html.escape(text, quote=False).replace("|", "&#124;")


def options_of_command(*command: str) -> set[str]:
    """Returns the options that a command of ``sora-jax`` names in its help."""
    return set(_OPTION.findall(help_text(sora_jax_main, *command)))


def modules_table() -> str:
    """Returns a table of modules for each room, from below: name and the first line of its docstring."""
    lines: list[str] = []
    for room in ["", *rooms()]:
        folder = ROOT / "convert_weights" if room == "convert_weights" else ROOT / "sora_jax" / room
        lines += [f"### `{folder.relative_to(ROOT)}/`", "", _first_line(folder / "__init__.py"), ""]
        lines += ["| module | what it is |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(summary)} |" for name, summary in _modules(folder)]
        lines += [""]
    return "\n".join(lines)


def rooms() -> list[str]:
    """Returns the rooms that are folders, from below."""
    folders = {path.parent.name for path in (ROOT / "sora_jax").glob("*/__init__.py")} | {"convert_weights"}
    return [room for floor in ORDER for room in floor if room in folders]


def _modules(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*.py")):
        inner = path.relative_to(folder)
        nested_room = folder.parent == ROOT and len(inner.parts) > 1
        if path.name != "__init__.py" and not nested_room:
            yield str(inner), _first_line(path)


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n\n")[0].replace("\n", " ").replace("``", "`")


GENERATED = {
    "options": (ROOT / "docs" / "options.md", options_table.table),
    "modules": (ROOT / "docs" / "architecture.md", modules_table),
    "compiled": (ROOT / "docs" / "devices.md", compiled_ahead.page_table),
    "meshes": (ROOT / "docs" / "devices.md", meshes_ahead.page_table),
}


def generated(name: str) -> tuple[str, str]:
    """Returns the page that holds a generated part as it is, and as it should be."""
    path, make = GENERATED[name]
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- generated: {name} -->\n", "<!-- end of generated part -->"
    before, rest = text.split(begin)
    return text, before + begin + "\n" + make() + "\n" + end + rest.split(end, 1)[1]


def main() -> None:
    """Writes the generated parts of the pages."""
    for name, (path, _) in GENERATED.items():
        path.write_text(generated(name)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
