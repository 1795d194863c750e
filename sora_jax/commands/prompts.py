"""Prompts from the command line or from a file, as texts that can be printed and stored.

Invariant: there is at least one text, and each is UTF-8.  `sora_jax.inputs.prompt` knows what a prompt means.
"""

from collections.abc import Sequence

from sora_jax import files
from sora_jax.commands.options import PromptFile
from sora_jax.inputs import prompt


def read_prompts(asked: PromptFile, texts: Sequence[str], how: str = "a prompt in quotes") -> list[str]:
    """Returns the prompts of the command line or of the file; ``how`` says how the command line takes them.

    Raises:
      ValueError: there is none, or one is no text, or a line of the file is empty.
    """
    path = asked.prompt_path
    if texts and path:
        raise ValueError("got prompts and --prompt-path; give one of them.")
    if asked.end_index is not None and not path:
        raise ValueError("--end-index selects lines of a prompt file; give --prompt-path as well.")
    where = ""
    if path:
        last = "the end" if asked.end_index is None else asked.end_index
        texts, where = _read(path, asked.start_index, asked.end_index), f" in {path}, lines {asked.start_index} to {last}"
    if not texts:
        raise ValueError(f"no prompt{where}; give {how}, or --prompt-path FILE.")
    for index, text in enumerate(texts, start=asked.start_index):
        which = f"prompt {index}{where and f' of {path}'}"
        if path and not text.strip():
            raise ValueError(f"{which} is empty; write one, or give an empty prompt as '' on the command line.")
        if not files.is_utf8(text):
            raise ValueError(f"{which} is not text in UTF-8: {text!r}.")
    return list(texts)


def _read(path: str, start: int, end: int | None) -> list[str]:
    try:
        return prompt.load_prompts(path, start, end)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error}).") from error
