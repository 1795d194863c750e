"""An option is written once: signature, settings, command line, JSON and documentation say the same."""

import dataclasses
import html
import json
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import pytest

from sora_jax.commands import calibrate, export, generate, inspect, options_table, run_exported
from sora_jax.networks.merge_rule import Merge, Odd, RopePositions
from sora_jax.pipeline import command_line
from sora_jax.pipeline.clip_options import OPTIONS, ClipOptions, Options, SamplingOptions
from sora_jax.pipeline.option import Option, declared
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.settings import Settings
from sora_jax.pocket import judge
from sora_jax.sampling.leap import Leap
from sora_jax.sampling.reuse import Plan
from sora_jax.sampling.solvers import SOLVERS

PACKAGE = Path(options_table.__file__).parents[1]
BY_NAME = {"preset", "recipe", "force_recipe", "resolution", "aspect_ratio"}  # they decide other settings
PARSER = command_line.make_parser("test", "", generate.GROUPS)
ACTIONS = {action.dest: action for action in PARSER._actions}


def kinds(hint: Any) -> set[Any]:
    """Returns the types of a union, None left out."""
    return {kind for kind in typing.get_args(hint) or (hint,) if kind is not types.NoneType}


def test_the_signature_is_the_declaration() -> None:
    parameter = typing.get_type_hints(Pipeline.__call__, localns={"Clip": Any})["options"]
    assert parameter == typing.Unpack[Options]
    named = Pipeline.__call__.__kwdefaults__ or {}
    assert len(named) <= 6
    assert not named.keys() & OPTIONS.keys()


def test_settings_have_every_option_but_those_that_name_others() -> None:
    assert set(Settings.field_names()) == OPTIONS.keys() - BY_NAME
    names = {"Leap": Leap, "Plan": Plan}
    fields = type("Fields", (), {"__annotations__": Settings.__annotations__})  # Settings itself is passed by
    said, settled = (typing.get_type_hints(owner, localns=names) for owner in (Options, fields))
    for name in Settings.field_names():
        # A setting is what may be said, with words for "none" and for numbers replaced by what they stand for.
        assert kinds(settled[name]) <= kinds(said[name]), name
        assert (types.NoneType in typing.get_args(settled[name])) == (
            (OPTIONS[name].option.off and name != "leap") or name == "plan"
        )


@pytest.mark.parametrize("name", OPTIONS)
def test_the_command_line_spells_helps_and_reads_as_declared(name: str) -> None:
    each = OPTIONS[name]
    if not each.option.on_command_line:
        assert name not in ACTIONS
        return
    action = ACTIONS[name]
    assert tuple(action.option_strings) == each.flags
    assert action.help == each.option.help.replace("%", "%%")
    assert action.default is None  # what is not said is the model's
    assert each.option.help[0].isupper() or each.option.help.startswith(each.option.choices[0])
    assert each.option.help.endswith(".")
    if each.option.default is not None:
        assert action.type is not None
        value = action.type(str(each.option.default))
        each.check(value)
        assert value == each.option.default


def test_every_command_has_the_options_it_says_as_generate_has_them() -> None:
    groups = [
        calibrate.OPTIONS,
        export.SIZE,
        export.LOOP,
        inspect.PLANNED,
        run_exported.LOOP,
        run_exported.NOISE,
        judge.SAMPLING,
    ]
    for name, each in ((name, each) for group in groups for name, each in group.items()):
        assert each.flags == OPTIONS[name].flags
        assert each.option.within == OPTIONS[name].option.within
        assert each.option.help == OPTIONS[name].option.help


def test_json_has_every_setting_and_returns_it() -> None:
    settings = Settings.resolve(
        {}, {"leap": Leap.static(2, extrapolate=True), "merge_steps": 3, "merge": Merge(odd="released")}
    )
    written = json.loads(json.dumps(settings.to_dict()))
    assert list(written) == Settings.field_names()
    assert Settings.from_dict({**written, "prompt": "a", "model": "b"}) == settings
    older = {name: value for name, value in written.items() if not name.startswith(("guidance_", "reuse"))}
    assert len(written) - len(older) == 10
    assert Settings.from_dict(older) == settings
    with pytest.raises(KeyError, match="guidance"):
        Settings.from_dict({name: value for name, value in older.items() if name != "guidance"})
    planned = Settings.resolve({}, {"plan": Plan.evaluate_at([0, 2], 4), "align": "off", "aes": "off"})
    assert Settings.from_dict(json.loads(json.dumps(planned.to_dict()))) == planned


def test_the_table_of_the_documentation_has_a_row_for_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert options_table.main([]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[html.unescape(cell) for cell in line.removeprefix("| ").removesuffix(" |").split(" | ")] for line in lines]
    by_name = {row[1].strip("`"): row for row in rows}
    for name, each in OPTIONS.items():
        spelling, _, value, default, meaning = by_name[name]
        assert (value, meaning) == (each.expected, each.option.help)
        assert re.findall(r"(?<!\w)--?[a-z][\w-]*", spelling) == list(each.flags if each.option.on_command_line else ())
        assert default in ("", f"`{each.option.default}`")


def test_words_that_other_rooms_define_are_theirs() -> None:
    """Lists that a declaration needs without JAX, against those of the code that acts on them."""
    assert OPTIONS["solver"].option.choices == SOLVERS
    spelt = declared(generate.Arguments)
    assert spelt["merge_odd"].option.choices == typing.get_args(Odd)
    assert spelt["merge_positions"].option.choices == typing.get_args(RopePositions)
    assert OPTIONS["merge"].option.default == Merge()


def test_a_new_option_needs_its_declaration_and_its_setting_alone() -> None:
    """Parser, check, documentation and the value of a command follow from one annotated field."""

    class More(Options, total=False):
        sharpness: Annotated[float | str | None, Option("How sharp.", metavar="S|off", within=(0, 1), off=True)]

    group = {"sharpness": declared(More)["sharpness"]}
    parser = command_line.make_parser("test", "", {"": group})

    @dataclasses.dataclass
    class Arguments:
        clip: dict[str, Any]

    assert command_line.read(parser, ["--sharpness", "0.5"], Arguments, group).clip == {"sharpness": 0.5}
    assert command_line.read(parser, [], Arguments, group).clip == {}
    with pytest.raises(ValueError, match=r"^--sharpness is 2; expected a number from 0 to 1, or off\.$"):
        command_line.read(parser, ["--sharpness", "2"], Arguments, group)


@pytest.mark.parametrize(("name", "most"), [("condition_frame_edit", 4), ("solver", 8)])
def test_few_files_name_an_option(name: str, most: int) -> None:
    """An option is its declaration, its setting, its use and a test; each file more is a place to forget.

    Recipes are what `tune` has written.
    """
    found = [path for suffix in ("py", "json", "md") for path in PACKAGE.rglob(f"*.{suffix}")]
    sources = [path for path in found if path.parent.name != "recipes"]
    naming = sorted(str(path.relative_to(PACKAGE)) for path in sources if re.search(rf"\b{name}\b", path.read_text("utf-8")))
    assert len(naming) <= most, naming


def test_groups_of_help_are_all_options() -> None:
    assert {**declared(ClipOptions), **declared(SamplingOptions)} == OPTIONS
