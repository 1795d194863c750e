"""The walls of the house: a room imports only the rooms below it, and imports run in no circle.

Every import is read: statements inside functions and under TYPE_CHECKING, and modules named in strings, which importlib or a
child process will import.  docs/architecture.md explains the order.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sora_jax", "convert_weights")
# From below.  Rooms of one line do not import each other, except on the ground floor.
ORDER = (
    ("version", "lazy", "config", "layout", "process", "shell", "files", "metrics"),
    ("storage",),
    ("inputs", "networks", "sampling"),
    ("devices",),
    ("streaming",),
    ("convert_weights", "pipeline"),
    ("export",),
    ("planning", "pocket"),
    ("commands",),
)
FLOOR = ORDER[0]
ENTRIES = ("sora_jax", "sora_jax.__main__", "convert_weights.__main__")  # public names and the two entry points
# What a room may import at most, where that is less than all the rooms below it.
ONLY: Mapping[str, set[str]] = {
    "networks": {"config", "layout"},
    "sampling": {"lazy", "layout", "files", "process"},
    "storage": set(FLOOR),
    "inputs": {*FLOOR, "storage"},
    "streaming": {*FLOOR, "storage", "inputs", "networks", "devices"},
}


def rooms_of(module: str) -> str:
    """Returns the room that a module stands in: a folder, or a single file on the ground floor."""
    parts = module.split(".")
    return parts[0] if parts[0] == "convert_weights" else (parts[1] if len(parts) > 1 else "sora_jax")


def modules() -> dict[str, Path]:
    """Returns every module of the packages by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, known: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Yields (imported module, the statement) for every import of our own packages, by statement or by name in a string."""
    tree = ast.parse(path.read_text())
    # What a module does as a program is an entry point: it may hand over to a command.
    entry = "if __name__ == '__main__':"
    tree.body = [statement for statement in tree.body if not ast.unparse(statement).startswith(entry)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in known and "." in node.value:
            yield node.value, f"{module}:{node.lineno} {node.value!r}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PACKAGES:
                    yield alias.name, f"{module}:{node.lineno} import {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively"
            for alias in node.names if (node.module or "").split(".")[0] in PACKAGES else ():
                full = f"{node.module}.{alias.name}"
                target = full if full in known else node.module
                yield str(target), f"{module}:{node.lineno} from {node.module} import {alias.name}"


KNOWN = modules()
LEVEL = {room: number for number, line in enumerate(ORDER) for room in line}
ARROWS = [(name, target, text) for name, path in KNOWN.items() for target, text in imports(name, path, KNOWN)]


def test_every_room_has_its_place():
    places = {room for line in ORDER for room in line}
    assert {rooms_of(name) for name in KNOWN} - places == {"sora_jax", "__main__"}


def test_a_room_imports_only_rooms_below_it():
    strange = [text for name, target, text in ARROWS if name not in ENTRIES and forbidden(rooms_of(name), rooms_of(target))]
    assert not strange, "\n".join(strange)


def forbidden(room: str, other: str) -> bool:
    """Returns whether a module of one room must not import from another."""
    if room == other or (room in FLOOR and other in FLOOR):
        return False
    if other not in LEVEL or LEVEL[other] >= LEVEL[room]:
        return True
    return room in ONLY and other not in ONLY[room]


@pytest.mark.parametrize(
    ("room", "other", "expected"),
    [
        ("networks", "storage", True),
        ("sampling", "networks", True),
        ("streaming", "sampling", True),
        ("storage", "pipeline", True),
        ("export", "commands", True),
        ("pipeline", "sora_jax", True),
        ("pipeline", "sampling", False),
        ("commands", "convert_weights", False),
    ],
)
def test_the_walls_stand_where_the_design_has_them(room, other, expected):
    assert forbidden(room, other) is expected


def test_only_its_entry_point_ties_the_converter_to_the_commands():
    tied = [text for name, target, text in ARROWS if rooms_of(name) == "convert_weights" and rooms_of(target) == "commands"]
    assert all(text.startswith("convert_weights.__main__:") for text in tied), tied


def test_no_module_imports_the_package_itself():
    assert not [text for name, target, text in ARROWS if target == "sora_jax"]


@pytest.mark.parametrize("of", ["modules", "rooms"])
def test_imports_run_in_no_circle(of):
    graph: dict[str, set[str]] = {}
    for name, target, _ in ARROWS:
        if name in ENTRIES:
            continue
        a, b = (name, target) if of == "modules" else (rooms_of(name), rooms_of(target))
        if a != b:
            graph.setdefault(a, set()).add(b)
    assert not circle(graph)


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Returns the names along one circle of the graph, or nothing."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            if found := visit(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_a_circle_would_be_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []
