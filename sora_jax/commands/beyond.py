"""What of a request lies beyond the model: words that it does not know, sizes and lengths that it was not trained for.

Invariant: nothing is refused; these are lines for the person who asks, on the command line and on the page.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sora_jax.inputs import prompt
from sora_jax.pipeline.settings import Settings

if TYPE_CHECKING:
    from sora_jax.pipeline.pipeline import Pipeline

_MAX_WORDS = 10  # of a prompt that the model does not know


def beyond(pipeline: "Pipeline", settings: Settings, prompts: Sequence[str]) -> list[str]:
    """Returns a line for each; none where the request is what the model was trained for."""
    trained, lines = pipeline.model.trained, []
    segments = [segment for text in dict.fromkeys(prompts) for segment in prompt.split_prompt(text)[0]]
    words = list(dict.fromkeys(word for segment in segments for word in pipeline.tokenizer.unknown_words(segment)))
    if words:
        more = " ..." if len(words) > _MAX_WORDS else ""
        known = f" It knows {trained.captions}." if trained is not None and trained.captions else ""
        lines.append(f"the model does not know {', '.join(words[:_MAX_WORDS])}{more}.{known}")
    outside = trained.outside(settings) if trained is not None else ""
    return [*lines, outside] if outside else lines
