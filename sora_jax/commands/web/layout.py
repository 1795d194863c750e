"""The page itself: what a person sees and presses, built of Gradio's own components.

Invariant: a handler reads the form, asks the `Studio`, and shows what it answers; it computes nothing.  No front-end code of
our own, and no font or script from elsewhere.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from sora_jax import shell
from sora_jax.commands.inspect import inspect_memory
from sora_jax.commands.web import comparing, form, timeline
from sora_jax.commands.web.gallery import Gallery, secret_of
from sora_jax.commands.web.made import Made
from sora_jax.commands.web.studio import Step, Studio
from sora_jax.inputs.references import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from sora_jax.inputs.tokenizer import listed_words
from sora_jax.pipeline.clip_options import OPTIONS
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.option import Declared
from sora_jax.pipeline.recipe import Recipe
from sora_jax.storage.location import Location

_COMPUTES: dict[str, Any] = {"concurrency_id": "computes", "concurrency_limit": 1}
_EXAMPLE = "a red circle moves right on a blue background"
_WAY = ("preset", "recipe", *form.SAMPLING)
_FORGETS_S = (600, 6 * 3600)  # how often files of the browser are looked through, and at what age they are removed


def theme() -> gr.themes.Base:
    """Returns a theme whose fonts the visitor's system has."""
    return gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build(studio: Studio) -> gr.Blocks:
    """Returns the page of a studio."""
    with gr.Blocks(title="sora_jax", analytics_enabled=False, delete_cache=_FORGETS_S) as page:
        gr.Markdown(f"# sora_jax\nText to video with {studio.pipeline.model_id}. {_trained(studio)}")
        with gr.Tab("Generate", elem_id="tab-generate"):
            _generate_tab(page, studio)
        with gr.Tab("Compare", elem_id="tab-compare"):
            _compare_tab(studio)
        with gr.Tab("Memory", elem_id="tab-memory"):
            _memory_tab(studio)
    return page


def _own(studio: Studio, request: gr.Request) -> Gallery:
    """Returns the gallery of the visitor who sends a request."""
    return studio.galleries.of(secret_of(request.headers.get("cookie") or ""))


def _trained(studio: Studio) -> str:
    trained = studio.pipeline.model.trained
    return f"It draws {trained.captions}." if trained is not None and trained.captions else ""


def _generate_tab(page: gr.Blocks, studio: Studio) -> None:
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="Prompt", value=_EXAMPLE, lines=2, max_length=20_000, elem_id="prompt")
            words = listed_words(studio.pipeline.model.tokenizer_path)
            if words is not None:
                with gr.Accordion("Words that the model knows", open=False):
                    gr.Markdown(" ".join(sorted(words)))
            size, length, seed, preset, recipe = _usual_fields(studio)
            options = {"num_frames": length, "seed": seed, "preset": preset, "recipe": recipe}
            with gr.Row():
                start = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Cancel", elem_id="cancel")
            with gr.Accordion("Image or clip to video", open=False):
                reference = gr.File(
                    label="Reference", file_types=[*IMAGE_SUFFIXES, *VIDEO_SUFFIXES], type="filepath", elem_id="reference"
                )
                mode = gr.Radio(list(form.MODES), value=form.TEXT, label="How it is used", elem_id="mode")
                strategy = gr.Textbox(label="Mask strategy of your own (empty: as chosen above)", elem_id="strategy")
            with gr.Accordion("More options", open=False):
                options |= {name: _field(OPTIONS[name], studio) for name in (*form.USUAL, *form.RARE)}
        with gr.Column():
            status = gr.Textbox(label="Progress", interactive=False, elem_id="status", lines=2)
            preview = gr.Image(label="What the step predicts", interactive=False, height=220, elem_id="preview", buttons=[])
            shown = gr.Video(label="Clip", interactive=False, autoplay=True, loop=True, elem_id="clip", height=320, buttons=[])
            listed = gr.Dropdown(label="Clips made since the page started", choices=[], elem_id="clips")
            with gr.Row():
                again = gr.Button("Make again", elem_id="again")
                extend = gr.Button("Send to extension", elem_id="extend")
            about = gr.JSON(label="Parameters", elem_id="parameters", open=False)
            downloads = gr.File(label="Download", file_count="multiple", interactive=False, elem_id="downloads")

    names, inputs = list(options), [prompt, size, reference, mode, strategy, *options.values()]

    def make(
        visit: gr.Request, text: str, size: str, reference: str, mode: str, strategy: str, *values: Any
    ) -> Iterator[Sequence[Any]]:
        gallery = _own(studio, visit)
        try:
            fields = dict(zip(names, values, strict=True))
            fields["recipe"] = form.read_recipe(fields["recipe"], studio.recipes)
            request = form.read(prompt=text, size=size, fields=fields, mode=mode, reference=reference, strategy=strategy)
        except ValueError as error:
            yield f"error: {shell.describe(error)}", *[gr.skip()] * 5
            return
        for step in studio.make(request, gallery):
            yield step.text, _picture(step), *_shown(gallery, step.made)

    outputs = [status, preview, shown, listed, about, downloads]
    start.click(make, inputs, outputs, api_name="generate", show_progress="hidden", **_COMPUTES)

    def stopped(visit: gr.Request) -> Any:
        return _stopped(studio, visit)

    def chosen(visit: gr.Request, number: int | None) -> Sequence[Any]:
        return _chosen(_own(studio, visit), number)

    def as_before(visit: gr.Request, number: int | None) -> Sequence[Any]:
        return _again(_own(studio, visit), names, number)

    def extended(visit: gr.Request, number: int | None) -> Sequence[Any]:
        return _extension(_own(studio, visit), number)

    def listing(visit: gr.Request) -> Sequence[Any]:
        return _listing(_own(studio, visit))

    stop.click(stopped, None, status, api_name="cancel", queue=False)
    reference.upload(_used, mode, mode, api_name=False, queue=False)
    reference.clear(lambda: form.TEXT, None, mode, api_name=False, queue=False)
    listed.input(chosen, listed, [shown, about, downloads], api_name=False, queue=False)
    again.click(as_before, listed, [*inputs, status], api_name=False, queue=False)
    extend.click(extended, listed, [reference, mode, status], api_name=False, queue=False)
    page.load(listing, None, [listed, shown, about, downloads], api_name=False, queue=False)


def _usual_fields(studio: Studio) -> tuple[gr.Dropdown, gr.Dropdown, gr.Textbox, gr.Dropdown, gr.Dropdown]:
    model = studio.pipeline.model
    plain = model.resolve({})
    with gr.Row():
        size = gr.Dropdown(
            form.sizes_of(model), value=None, allow_custom_value=True, label=f"Size ({plain.height} x {plain.width})",
            info="height x width", elem_id="size",
        )  # fmt: skip
        length = gr.Dropdown(
            form.lengths_of(model), value=None, allow_custom_value=True, label=f"Frames ({plain.num_frames})", elem_id="frames"
        )
    with gr.Row():
        seed = gr.Textbox(value="0", label="Seed", elem_id="seed")
        preset = gr.Dropdown(_presets(model), value="", label="Preset", elem_id="preset")
        recipe = _recipe_field(studio, "Recipe", "recipe")
    return size, length, seed, preset, recipe


def _presets(model: ModelFile) -> list[tuple[str, str]]:
    """Returns the presets, each with what it costs."""
    costs = {name: model.resolve({"preset": name}).evaluations()[0] for name in model.presets()}
    return [("the model's own", ""), *((f"{name}: {count:g} evaluations", name) for name, count in costs.items())]


def _recipe_field(studio: Studio, label: str, identity: str) -> gr.Dropdown:
    """Returns the choice of a recipe, each with what it costs and how near it comes; hidden where the page has none."""
    known = {name: Recipe.read(path) for name, path in studio.recipes.items()}
    choices = [
        (f"{name}: {one.evaluations} evaluations, {one.measured.get('error_db', math.nan):.1f} dB", name)
        for name, one in known.items()
    ]
    return gr.Dropdown([("none", ""), *choices], value="", label=label, elem_id=identity, visible=bool(known))


def _field(option: Declared, studio: Studio, suffix: str = "") -> gr.components.Component:
    """Returns the component of an option: empty for the model's default."""
    plain = studio.pipeline.model.resolve({}).to_dict().get(option.name)
    label, identity = f"{option.name} ({'off' if plain is None else plain})", f"option-{option.name}{suffix}"
    if option.option.choices and option.kinds == ("str",):
        return gr.Dropdown(["", *option.option.choices], value="", label=label, info=option.option.help, elem_id=identity)
    return gr.Textbox(value="", label=label, info=option.option.help, elem_id=identity)


def _new(value: Any) -> Any:
    """Returns an update of a component that sets its value alone.

    What is skipped while something is computed gets its values this way.  A skip is an update too, and an update makes Gradio 6
    build the component anew; a plain value after it would keep that component, about 10 kB, for as long as the session lasts.
    """
    return gr.update(value=value)


def _picture(step: Step) -> Any:
    return gr.skip() if step.picture is None else _new(step.picture)


def _shown(gallery: Gallery, made: Made | None) -> Sequence[Any]:
    if made is None:
        return [gr.skip()] * 4
    path, parameters, files = _outputs(gallery, made)
    return [path, gr.update(choices=gallery.titles(), value=made.number), parameters, files]


def _outputs(gallery: Gallery, made: Made) -> tuple[Any, Any, Any]:
    """Returns the clip to play, its parameters, and the files to download; the GIF is made when it is first shown."""
    from sora_jax.pipeline import video
    from sora_jax.pipeline.clip_frames import read_frames

    shown = gallery.place(made.path)
    animation = shown.with_suffix(".gif")
    parameters = dict(made.clip.parameters[0])
    if not animation.exists():
        video.save(read_frames(made.path), animation, fps=made.clip.fps, parameters=parameters, overwrite=True)
    return _new(str(shown)), _new(parameters), _new([str(shown), str(animation)])


def _chosen(gallery: Gallery, number: int | None) -> Sequence[Any]:
    made = gallery.find(number)
    return [gr.skip()] * 3 if made is None else _outputs(gallery, made)


def _listing(gallery: Gallery) -> Sequence[Any]:
    """Returns the list of a visitor's clips with the newest chosen, and what shows it: a page that was loaded again goes on."""
    newest = gallery.made[-1].number if gallery.made else None
    return [gr.update(choices=gallery.titles(), value=newest), *_chosen(gallery, newest)]


def _stopped(studio: Studio, visit: gr.Request) -> Any:
    """Returns the line of progress, which is left to the computation where there is one: its last word comes at any moment."""
    if not studio.cancel(_own(studio, visit)):
        return "nothing of yours is being made."
    gr.Info("Cancelled at its next step.")
    return gr.skip()


def _used(mode: str) -> str:
    """Returns how a reference is used that was just uploaded: as a beginning, unless the visitor has chosen before."""
    return form.BEGIN if mode == form.TEXT else mode


def _again(gallery: Gallery, names: Sequence[str], number: int | None) -> Sequence[Any]:
    """Returns the fields of the form as they were for a clip."""
    made = gallery.find(number)
    if made is None:
        return [*[gr.skip()] * (5 + len(names)), "choose a clip of the list first."]
    request, options = made.request, dict(made.request.options)
    size = f"{options['height']} x {options['width']}" if "height" in options else None
    if "resolution" in options:
        size = f"{options['resolution']} {options['aspect_ratio']}"
    if options.get("recipe") is not None:
        options["recipe"] = Path(options["recipe"]).name
    values = ["" if options.get(name) is None else str(options[name]) for name in names]
    reference = [request.reference or None, form.mode_of(request), form.own_strategy(request)]
    return [request.prompt, size, *reference, *values, "as for that clip."]


def _extension(gallery: Gallery, number: int | None) -> Sequence[Any]:
    made = gallery.find(number)
    if made is None:
        return gr.skip(), gr.skip(), "choose a clip of the list first."
    return str(gallery.place(made.path)), form.CONTINUE, f"clip {made.number} will be continued; press Generate."


def _compare_tab(studio: Studio) -> None:
    prompt = gr.Textbox(label="Prompt", value=_EXAMPLE, elem_id="compare-prompt")
    with gr.Row():
        seed = gr.Textbox(value="0", label="Seed", elem_id="compare-seed")
        length = gr.Textbox(value="", label="Frames (the model's own)", elem_id="compare-frames")
    finer = gr.Checkbox(value=False, label="also against a finer solution (119 evaluations)", elem_id="compare-finer")
    ways: list[gr.components.Component] = []
    with gr.Row():
        for name, preset in (("A", "exact"), ("B", "recommended")):
            with gr.Column():
                gr.Markdown(f"### {name}")
                presets = _presets(studio.pipeline.model)
                ways.append(gr.Dropdown(presets, value=preset, label="preset", elem_id=f"preset-{name}"))
                ways.append(_recipe_field(studio, "recipe (with no preset)", f"recipe-{name}"))
                with gr.Accordion("Options of this way", open=False):
                    ways += [_field(OPTIONS[option], studio, f"-{name}") for option in form.SAMPLING]
    with gr.Row():
        start = gr.Button("Compare", variant="primary", elem_id="compare")
        stop = gr.Button("Cancel", elem_id="compare-cancel")
    status = gr.Textbox(label="Progress", interactive=False, elem_id="compare-status")
    with gr.Row():
        videos = [
            gr.Video(label=label, interactive=False, autoplay=True, loop=True, elem_id=identity, height=260, buttons=[])
            for label, identity in (("A", "clip-a"), ("B", "clip-b"), ("difference, four times", "difference"))
        ]
    table = gr.Dataframe(headers=comparing.HEAD, interactive=False, elem_id="comparison")
    plot = gr.LinePlot(
        x="step", y="cosine", color="clip", label="Cosine of the velocity with the step before", elem_id="cosines"
    )
    steps = gr.Dataframe(headers=["clip", "step", "time", "evaluations", "what it did"], interactive=False, label="Steps")

    def compare(visit: gr.Request, text: str, seed: str, length: str, finer: bool, *values: Any) -> Iterator[Sequence[Any]]:
        gallery = _own(studio, visit)
        try:
            both = []
            for way in (values[: len(_WAY)], values[len(_WAY) :]):
                fields = {"seed": seed, "num_frames": length, **dict(zip(_WAY, way, strict=True))}
                fields["recipe"] = form.read_recipe(fields["recipe"], studio.recipes)
                both.append(form.read(prompt=text, size=None, fields=fields))
        except ValueError as error:
            yield f"error: {shell.describe(error)}", *[gr.skip()] * 6
            return
        work = functools.partial(comparing.compare, studio, gallery, both[0], both[1], finer=finer)
        for step in studio.steps(work, gallery):
            yield step.text, *_compared(gallery, step.made)

    def stopped(visit: gr.Request) -> Any:
        return _stopped(studio, visit)

    outputs = [status, *videos, table, plot, steps]
    start.click(compare, [prompt, seed, length, finer, *ways], outputs, api_name="compare", show_progress="hidden", **_COMPUTES)
    stop.click(stopped, None, status, api_name=False, queue=False)


def _compared(gallery: Gallery, found: comparing.Comparison | None) -> Sequence[Any]:
    if found is None:
        return [gr.skip()] * 6
    import pandas

    rows = pandas.DataFrame(found.traces, columns=["clip", "step", "cosine", "time", "evaluations", "kind"])
    details = rows[["clip", "step", "time", "evaluations", "kind"]].values.tolist()
    paths = [str(gallery.place(path)) for path in (found.first.path, found.second.path, found.difference)]
    return [_new(value) for value in (*paths, found.rows, rows.dropna(subset=["cosine"]), details)]


def _memory_tab(studio: Studio) -> None:
    gr.Markdown("What a generation needs, before it runs. `sora-jax page --memory-budget SIZE` runs within a budget.")
    with gr.Row():
        budget = gr.Textbox(label="Budget, such as 3.3GB (empty: none)", elem_id="budget")
        size = gr.Dropdown(
            form.sizes_of(studio.pipeline.model), value=None, allow_custom_value=True, label="Size", elem_id="budget-size"
        )
        length = gr.Textbox(label="Frames (the model's own)", elem_id="budget-frames")
    start = gr.Button("Plan", variant="primary", elem_id="plan")
    plan = gr.Code(label="Plan", interactive=False, elem_id="memory-plan", language=None, lines=8)
    picture = gr.HTML(label="The last streamed run")
    refresh = gr.Button("Timeline of the last streamed run", elem_id="timeline")

    def show(budget: str, size: str, length: str) -> str:
        try:
            clip = {**form.read_size(size), "num_frames": form.read_option("num_frames", length)}
            path: Location = studio.pipeline.model.directory
            return "\n".join(inspect_memory(path, clip, memory_budget=budget.strip() or None)[1])
        except ValueError as error:
            return f"error: {shell.describe(error)}"

    def draw(visit: gr.Request) -> str:
        profile = _own(studio, visit).profile
        intervals = profile.intervals if profile is not None else []
        return timeline.svg(intervals) or "<p>Nothing was streamed: start the page with --memory-budget.</p>"

    start.click(show, [budget, size, length], plan, api_name="plan", concurrency_limit=2)
    refresh.click(draw, None, picture, api_name=False, queue=False)
