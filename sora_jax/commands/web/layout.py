"""The page itself: what a person sees and presses, built of Gradio's own components.

Invariant: a handler reads the form, asks the `Studio`, and shows what it answers; it computes nothing.  No front-end code of
our own, and no font or script from elsewhere.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from sora_jax import shell
from sora_jax.commands.inspect import inspect_memory
from sora_jax.commands.web import comparing, form, timeline
from sora_jax.commands.web.studio import Made, Step, Studio, numbers
from sora_jax.inputs.references import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from sora_jax.inputs.tokenizer import listed_words
from sora_jax.pipeline.option import Declared
from sora_jax.pipeline.presets import PRESETS, WAYS
from sora_jax.pipeline.settings import OPTIONS
from sora_jax.storage.location import Location

_COMPUTES: dict[str, Any] = {"concurrency_id": "computes", "concurrency_limit": 1}
_EXAMPLE = "a red circle moves right on a blue background"
_WAY = ("preset", *WAYS)


def theme() -> gr.themes.Base:
    """Returns a theme whose fonts the visitor's system has."""
    return gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build(studio: Studio) -> gr.Blocks:
    """Returns the page of a studio."""
    with gr.Blocks(title="sora_jax", analytics_enabled=False) as page:
        gr.Markdown(f"# sora_jax\nText to video with {studio.pipeline.model_id}. {_trained(studio)}")
        with gr.Tab("Generate", elem_id="tab-generate"):
            _generate_tab(page, studio)
        with gr.Tab("Compare", elem_id="tab-compare"):
            _compare_tab(studio)
        with gr.Tab("Memory", elem_id="tab-memory"):
            _memory_tab(studio)
    return page


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
            size, length, seed, preset = _usual_fields(studio)
            options = {"num_frames": length, "seed": seed, "preset": preset}
            with gr.Accordion("Image or clip to video", open=False):
                reference = gr.File(
                    label="Reference", file_types=[*IMAGE_SUFFIXES, *VIDEO_SUFFIXES], type="filepath", elem_id="reference"
                )
                mode = gr.Radio(list(form.MODES), value=form.TEXT, label="How it is used", elem_id="mode")
                strategy = gr.Textbox(label="Mask strategy (of its own; else as chosen above)", elem_id="strategy")
            with gr.Accordion("More options", open=False):
                options |= {name: _field(OPTIONS[name], studio) for name in (*form.USUAL, *form.RARE)}
            with gr.Row():
                start = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Cancel", elem_id="cancel")
        with gr.Column():
            status = gr.Textbox(label="Progress", interactive=False, elem_id="status", lines=2)
            preview = gr.Image(label="Latents on the way", interactive=False, height=220, elem_id="preview", buttons=[])
            shown = gr.Video(label="Clip", interactive=False, autoplay=True, loop=True, elem_id="clip", height=320, buttons=[])
            listed = gr.Dropdown(label="Clips made since the page started", choices=[], elem_id="clips")
            with gr.Row():
                again = gr.Button("Make again", elem_id="again")
                extend = gr.Button("Send to extension", elem_id="extend")
            about = gr.JSON(label="Parameters", elem_id="parameters", open=False)
            downloads = gr.File(label="Download", file_count="multiple", interactive=False, elem_id="downloads")

    names, inputs = list(options), [prompt, size, reference, mode, strategy, *options.values()]

    def make(text: str, size: str, reference: str, mode: str, strategy: str, *values: Any) -> Iterator[Sequence[Any]]:
        try:
            fields = dict(zip(names, values, strict=True))
            request = form.read(prompt=text, size=size, fields=fields, mode=mode, reference=reference, strategy=strategy)
        except ValueError as error:
            yield f"error: {shell.describe(error)}", gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        for step in studio.make(request):
            yield step.text, _picture(step), *_shown(studio, step.made)

    outputs = [status, preview, shown, listed, about, downloads]
    start.click(make, inputs, outputs, api_name="generate", show_progress="hidden", **_COMPUTES)
    stop.click(lambda: _stopped(studio), None, status, api_name="cancel", queue=False)
    listed.input(lambda number: _chosen(studio, number), listed, [shown, about, downloads], api_name=False, queue=False)
    again.click(lambda number: _again(studio, names, number), listed, [*inputs, status], api_name=False, queue=False)
    extend.click(lambda number: _extension(studio, number), listed, [reference, mode, status], api_name=False, queue=False)
    page.load(lambda: _listing(studio), None, listed, api_name=False, queue=False)


def _usual_fields(studio: Studio) -> tuple[gr.Dropdown, gr.Dropdown, gr.Textbox, gr.Dropdown]:
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
        costs = {name: model.resolve({"preset": name}).num_steps for name in PRESETS}
        choices = [("the model's own", ""), *((f"{name}: {steps} steps", name) for name, steps in costs.items())]
        preset = gr.Dropdown(choices, value="", label="Preset", elem_id="preset")
    return size, length, seed, preset


def _field(option: Declared, studio: Studio, suffix: str = "") -> gr.components.Component:
    """Returns the component of an option: empty for the model's default."""
    plain = studio.pipeline.model.resolve({}).to_dict().get(option.name)
    label, identity = f"{option.name} ({'off' if plain is None else plain})", f"option-{option.name}{suffix}"
    if option.option.choices and option.kinds == ("str",):
        return gr.Dropdown(["", *option.option.choices], value="", label=label, info=option.option.help, elem_id=identity)
    return gr.Textbox(value="", label=label, info=option.option.help, elem_id=identity)


def _picture(step: Step) -> Any:
    return gr.skip() if step.picture is None else step.picture


def _shown(studio: Studio, made: Made | None) -> Sequence[Any]:
    if made is None:
        return [gr.skip()] * 4
    path, parameters, files = _outputs(made)
    return [path, gr.update(choices=numbers(studio.made), value=made.number), parameters, files]


def _outputs(made: Made) -> tuple[str, Any, list[str]]:
    """Returns the clip to play, its parameters, and the files to download; the GIF is made when it is first shown."""
    from sora_jax.pipeline import video
    from sora_jax.pipeline.clip_frames import read_frames

    animation = made.path.with_suffix(".gif")
    parameters = dict(made.clip.parameters[0])
    if not animation.exists():
        video.save(read_frames(made.path), animation, fps=made.clip.fps, parameters=parameters)
    return str(made.path), parameters, [str(made.path), str(animation)]


def _chosen(studio: Studio, number: int | None) -> Sequence[Any]:
    made = studio.find(number)
    return [gr.skip()] * 3 if made is None else _outputs(made)


def _listing(studio: Studio) -> Any:
    newest = studio.made[-1].number if studio.made else None
    return gr.update(choices=numbers(studio.made), value=newest)


def _stopped(studio: Studio) -> str:
    return "cancelling at the next step ..." if studio.cancel() else "nothing is being made."


def _again(studio: Studio, names: Sequence[str], number: int | None) -> Sequence[Any]:
    """Returns the fields of the form as they were for a clip."""
    made = studio.find(number)
    if made is None:
        return [*[gr.skip()] * (5 + len(names)), "choose a clip of the list first."]
    request, options = made.request, dict(made.request.options)
    size = f"{options['height']} x {options['width']}" if "height" in options else None
    if "resolution" in options:
        size = f"{options['resolution']} {options['aspect_ratio']}"
    values = ["" if options.get(name) is None else str(options[name]) for name in names]
    mode = form.mode_of(request)
    return [request.prompt, size, request.reference or None, mode, form.own_strategy(request), *values, "as for that clip."]


def _extension(studio: Studio, number: int | None) -> Sequence[Any]:
    made = studio.find(number)
    if made is None:
        return gr.skip(), gr.skip(), "choose a clip of the list first."
    return str(made.path), form.CONTINUE, f"clip {made.number} will be continued; press Generate."


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
                ways.append(gr.Dropdown(["", *PRESETS], value=preset, label="preset", elem_id=f"preset-{name}"))
                with gr.Accordion("Options of this way", open=False):
                    ways += [_field(OPTIONS[option], studio, f"-{name}") for option in _WAY[1:]]
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

    def compare(text: str, seed: str, length: str, finer: bool, *values: Any) -> Iterator[Sequence[Any]]:
        try:
            both = []
            for way in (values[: len(_WAY)], values[len(_WAY) :]):
                fields = {"seed": seed, "num_frames": length, **dict(zip(_WAY, way, strict=True))}
                both.append(form.read(prompt=text, size=None, fields=fields))
        except ValueError as error:
            yield f"error: {shell.describe(error)}", *[gr.skip()] * 6
            return
        for step in studio.steps(lambda watch: comparing.compare(studio, both[0], both[1], watch, finer=finer)):
            yield step.text, *_compared(step.made)

    outputs = [status, *videos, table, plot, steps]
    start.click(compare, [prompt, seed, length, finer, *ways], outputs, api_name="compare", show_progress="hidden", **_COMPUTES)
    stop.click(lambda: _stopped(studio), None, status, api_name=False, queue=False)


def _compared(found: comparing.Comparison | None) -> Sequence[Any]:
    if found is None:
        return [gr.skip()] * 6
    import pandas

    rows = pandas.DataFrame(found.traces, columns=["clip", "step", "cosine", "time", "evaluations", "kind"])
    details = rows[["clip", "step", "time", "evaluations", "kind"]].values.tolist()
    paths = [str(path) for path in (found.first.path, found.second.path, found.difference)]
    return [*paths, found.rows, rows.dropna(subset=["cosine"]), details]


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

    def draw() -> str:
        intervals = studio.profile.intervals if studio.profile is not None else []
        return timeline.svg(intervals) or "<p>Nothing was streamed: start the page with --memory-budget.</p>"

    start.click(show, [budget, size, length], plan, api_name="plan", concurrency_limit=2)
    refresh.click(draw, None, picture, api_name=False, queue=False)
