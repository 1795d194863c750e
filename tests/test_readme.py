"""The README and the pages of docs as a reader follows them: their code runs as it stands and prints what they show.

Fences of one page run in order in one empty folder, Python in one namespace, `sora-jax` in this process.  A fence under the
comment `not-run` is only parsed: the shell splits it, and every option is one that the command has.  What must be typed into
a fresh machine (the first two commands) is run by .ci/run, which runs all other code of the pages too: that is slow.
"""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest

from sora_jax.commands.main import main
from tests.support import pages, recipe_pictures
from tests.support.pages import PAGES, ROOT, Fence, fences

INSTALL = (
    "python3 -m venv sora && sora/bin/pip install . && "
    'sora/bin/sora-jax generate "a red circle moves right on a blue background" -o circle.mp4\n'
)
TESTS = "python3 -m venv sora && sora/bin/pip install '.[test]' && sora/bin/python -m pytest -m \"not slow\" -n 2 -q\n"
ALL = [fence for page in PAGES for fence in fences(page)]
CODE = [fence for fence in ALL if fence.language in ("python", "sh") and fence.code not in (INSTALL, TESTS)]
RUNNING = sorted({fence.page for fence in CODE if fence.not_run is None})


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 7000


def test_the_readme_opens_with_two_commands_complete_on_a_fresh_machine():
    first, second = [fence for fence in ALL if fence.page == ROOT / "README.md" and fence.language == "sh"][:2]
    assert (first.code, second.code) == (INSTALL, TESTS)
    assert first.not_run is second.not_run is None


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_and_prints_what_it_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run_page(page)
    if page.stem == "recipes":
        recipe_pictures.check(tmp_path)


def run_page(page: Path) -> None:
    """Runs the code of a page in the working directory, and compares what it prints with what the page shows."""
    namespace: dict[str, object] = {"__name__": page.stem}
    for fence in CODE:
        if fence.page == page and fence.not_run is None:
            printed = run_python(fence, namespace) if fence.language == "python" else run_commands(fence)
            assert fence.output is None or printed == fence.output, fence.place


def run_python(fence: Fence, namespace: dict[str, object]) -> str:
    """Runs a fence in the page's namespace and returns what it printed; errors name the page's own lines."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * (fence.line - 1) + fence.code, str(fence.page), "exec"), namespace)
    return printed.getvalue()


def run_commands(fence: Fence) -> str:
    """Runs the commands of a fence in this process and returns what they wrote to standard output."""
    printed = io.StringIO()
    for program, *arguments in fence.commands:
        assert program == "sora-jax", f"{fence.place} runs {program}; mark the fence not-run, with the reason"
        with contextlib.redirect_stdout(printed):
            assert main(arguments) == 0, f"{fence.place}: {' '.join(arguments)}"
    return printed.getvalue()


@pytest.mark.parametrize("fence", [fence for fence in CODE if fence.not_run is not None], ids=lambda fence: fence.place)
def test_a_fence_that_does_not_run_is_right_as_far_as_parsing_goes(fence: Fence):
    assert fence.not_run, f"{fence.place} does not say why it does not run"
    if fence.language == "python":
        ast.parse(fence.code)
        return
    for program, *arguments in fence.commands:
        if program == "sora-jax":
            check_command(arguments)
        elif program == "python":
            check_module_command([program, *arguments])


def check_command(arguments: list[str]) -> None:
    """Checks that a command of ``sora-jax`` exists and has every option that is used, by its help."""
    command = arguments[:2] if arguments[0] == "convert" else arguments[:1]
    known = pages.options_of_command(*command)
    assert known, f"sora-jax {' '.join(command)} does not exist"
    used = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
    assert used <= known, f"sora-jax {' '.join(arguments)}: {', '.join(sorted(used - known))} is no option"


@pytest.mark.parametrize(
    "words", ["generate --step 3", "convert t5 a b --dtyp int8", "export pocket out --wait", "tunes model"]
)
def test_a_command_with_a_mistake_would_be_seen(words: str):
    with pytest.raises(AssertionError, match=r"is no option|does not exist"):
        check_command(words.split())


def check_module_command(words: list[str]) -> None:
    """Checks that ``python -m MODULE ...`` names a module of this project and options that it declares."""
    module = words[2]
    declared = pages.options_of_module(module)
    options = [word.partition("=")[0] for word in words[3:] if word.startswith("--")]
    assert set(options) <= declared, f"{' '.join(words)}: {module} declares {sorted(declared)}"


def test_the_docs_have_no_other_shell_than_sh():
    assert {fence.language for fence in ALL} <= {"python", "sh", "text", "bibtex"}


def test_the_first_example_of_fewer_evaluations_is_the_recommended_one():
    commands = [" ".join(words) for fence in ALL if fence.language == "sh" for words in fence.commands]
    fewer = [text for text in commands if any(option in text for option in ("--preset", "--leap", "--merge-steps", "--plan"))]
    assert "--preset recommended" in fewer[0]
