"""The README, docs and the index of benchmarks agree with the repository: links, paths, commands, generated tables."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sora_jax
from sora_jax.export.check import LIMITS, Limits
from tests.support import pages
from tests.support.pages import PAGES, ROOT
from tests.test_readme import check_module_command

CARDS = [
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks/README.md",
    ROOT / "sora_jax/pocket/weights/README.md",
]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*/*.py"))
RESULTS = sorted((ROOT / "benchmarks" / "results").iterdir())


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)  # code may look like a link
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"`((?:sora_jax|convert_weights|tests|benchmarks|docs)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for name in re.findall(r"`(\w+\.json)`", text):
        if name.startswith("pocket_judge"):
            assert (ROOT / "benchmarks" / "results" / name).exists(), f"{page.name} names {name}"


def commands_shown() -> Iterator[tuple[str, list[str]]]:
    """Yields every ``python -m MODULE ...`` of pages, cards, docstrings of benchmarks and results, with its place."""
    for path in [*PAGES, *CARDS]:
        yield from ((path.name, words) for words in pages.module_commands(path.read_text(encoding="utf-8")))
    for path in BENCHMARKS:
        for line in re.findall(r"python -m [a-z_.]+[^\n`)]*", path.read_text(encoding="utf-8")):
            yield path.name, line.split("#")[0].split()
    for path in RESULTS:
        if path.suffix == ".json" and (command := json.loads(path.read_text()).get("command")):
            yield path.name, command.split()


def test_commands_name_modules_that_exist_and_options_they_have():
    shown = [(place, words) for place, words in commands_shown() if words[2] not in ("venv", "pytest") and "<" not in words[2]]
    assert len(shown) > 50
    for place, words in shown:
        module = words[2].strip(".,;`'\"")
        if module in ("convert_weights", "sora_jax"):
            continue
        path = ROOT / Path(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{place}: {' '.join(words)}"
        check_module_command([*words[:2], module, *(re.split(r"[\],.;]", word.lstrip("["))[0] for word in words[3:])])


def test_a_benchmark_is_called_as_a_module():
    for path in [*PAGES, *CARDS, *BENCHMARKS]:
        assert not re.search(r"python benchmarks/", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("name", pages.GENERATED)
def test_generated_parts_are_those_of_the_code(name: str):
    now, wanted = pages.generated(name)
    assert now == wanted, "write them anew with: python -m tests.support.pages"


def test_the_limits_of_exports_are_those_of_the_check():
    rows = re.findall(r"^\| (\w+) \| (\d+) dB \| ([\d.]+) \|$", (ROOT / "docs" / "export.md").read_text("utf-8"), re.MULTILINE)
    assert {name: Limits(float(floor), float(ceiling)) for name, floor, ceiling in rows} == LIMITS


def test_the_api_has_every_public_name():
    documented = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    names = {path.rpartition(".")[2] for path in documented}
    assert set(sora_jax.__all__) - {"__version__"} <= names


def test_every_page_is_in_the_menu():
    menu = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(menu) == sorted(page.name for page in PAGES if page.parent == ROOT / "docs")


def test_the_picture_of_rooms_has_every_room():
    picture = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    drawn = re.findall(r'class="room"[^>]*>([^<]+)<', picture)
    assert sorted(drawn) == sorted([*pages.rooms(), "ground floor"])


def test_the_order_of_rooms_is_that_of_the_walls():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    floors = [re.findall(r"`(\w+)`", line) for line in re.findall(r"^\d\. (.*)$", text, re.MULTILINE)][1:]
    rooms = pages.rooms()
    assert [room for floor in floors for room in sorted(floor, key=rooms.index)] == rooms
