"""T5 token ids of texts, from a ``tokenizer.json`` or a ``spiece.model``.

Both files give the same ids: special tokens written in the text (``</s>``, ``<extra_id_7>``) are recognised with either.
The one known exception is a combining mark right behind a character that normalisation replaces (U+2026 U+0301), which the
``tokenizers`` library drops and SentencePiece keeps.  Text is tokenised as it stands; cleaning captions is the business of
``sora_jax.inputs.cleaning``.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Bool, Int

from sora_jax import files
from sora_jax.storage.location import Address, Location, location_of
from sora_jax.storage.site import place_of

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
MAX_BYTES = 1 << 26  # T5's own files have 1.4 MB and 0.8 MB
NUM_EXTRA_IDS = 100  # T5's sentinels <extra_id_0..99>, numbered downwards behind the SentencePiece vocabulary
_PROBE = "A caf\u00e9, \uff21\u2460 \ufb01\u2026 \u6771 1/2"  # uses every part, so that what is damaged fails when it is opened


class Tokenizer:
    """Holds the open vocabulary; ``from_file`` is the usual way to get one."""

    def __init__(
        self, split: Callable[[str], list[int]], *, pad_id: int, eos_id: int, vocab_size: int, unk_id: int | None = None
    ):
        """``split`` returns the ids of a text without EOS and without padding; ids are below ``vocab_size``."""
        self._split = split
        self.pad_id, self.eos_id, self.vocab_size, self.unk_id = pad_id, eos_id, vocab_size, unk_id

    @classmethod
    def from_file(cls, path: str | Location) -> Self:
        """Returns the tokenizer stored in a ``tokenizer.json`` or ``spiece.model`` file, or at the address of one.

        Raises:
          FileNotFoundError: there is no such file.
          OSError: a server does not deliver it.
          ValueError: the file is neither, is damaged, or has no padding and end tokens.
        """
        path = location_of(path)
        readers, suffix = {".json": _read_json, ".model": _read_sentencepiece}, Path(path.name).suffix
        if suffix not in readers:
            raise ValueError(f"{path} is not a tokenizer file: got suffix {suffix!r}, expected tokenizer.json or spiece.model.")
        split, pad_id, eos_id, unk_id, vocab_size = readers[suffix](path, _fetched(path))
        return cls(split, pad_id=pad_id, eos_id=eos_id, vocab_size=vocab_size, unk_id=unk_id)

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Returns int32 ids padded to ``max_length`` and a mask that is True on text and end token.

        A text that is too long is cut so that the end token still fits.

        Source: Open-Sora v1.2 opensora/models/text_encoder/t5.py T5Embedder.get_text_embeddings.

        Raises:
          TypeError: the argument is a single text, not a sequence.
          ValueError: there is no room for the end token.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts is a single string {texts[:40]!r}; expected a sequence of strings: pass [text].")
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; expected at least 1, for the end token.")
        ids_BL = np.full((len(texts), max_length), self.pad_id, np.int32)
        mask_BL = np.zeros((len(texts), max_length), np.bool_)
        for row, text in enumerate(texts):
            ids = [*self._split(text)[: max_length - 1], self.eos_id]
            ids_BL[row, : len(ids)] = ids
            mask_BL[row, : len(ids)] = True
        return ids_BL, mask_BL

    def unknown_words(self, text: str) -> list[str]:
        """Returns the words of a text, in lower case, that the vocabulary lacks in whole or in part; each once."""
        words = dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower()))
        return [word for word in words if self.unk_id is not None and self.unk_id in self._split(word)]


def _fetched(path: Location) -> bytes | None:
    """Returns the bytes of an address; None for a file, which the libraries read themselves, if it is there and small.

    Raises:
      OSError, ValueError: it is missing, or too large.
    """
    if isinstance(path, Address):
        return place_of(path.parent).data(path.name, MAX_BYTES)
    files.refuse_missing(path, "Tokenizer file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes; expected a tokenizer of at most {MAX_BYTES}.")
    return None


def _read_json(path: Location, data: bytes | None) -> tuple[Callable[[str], list[int]], int, int, int | None, int]:
    with _panics_as_errors(f"{path} is not a readable tokenizer.json"):
        tokenizer = _opened(path, data)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode(_PROBE, add_special_tokens=False)
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    pad_id, eos_id = (_present(tokenizer.token_to_id(token), token, path) for token in (PAD, EOS))

    def split(text: str) -> list[int]:
        with _panics_as_errors(f"{path} cannot tokenise {text[:40]!r}", quiet=False):
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return split, pad_id, eos_id, tokenizer.token_to_id(UNK), largest + 1


def listed_words(path: str | Location) -> list[str] | None:
    """Returns the words of a tokenizer that knows whole words only, or None for one of word pieces, which splits any word.

    Raises:
      OSError: a server does not deliver it.
      ValueError: the file is damaged.
    """
    path = location_of(path)
    if not path.name.endswith(".json"):
        return None
    data = _fetched(path)
    with _panics_as_errors(f"{path} is not a readable tokenizer.json"):
        tokenizer = _opened(path, data)
        if not isinstance(tokenizer.model, tokenizers.models.WordLevel):
            return None
        return [word for word in tokenizer.get_vocab(with_added_tokens=False) if word not in (PAD, EOS, UNK)]


def _opened(path: Location, data: bytes | None) -> tokenizers.Tokenizer:
    read = tokenizers.Tokenizer
    return read.from_file(str(path)) if data is None else read.from_buffer(data)


@contextlib.contextmanager
def _panics_as_errors(what: str, *, quiet: bool = True) -> Iterator[None]:
    """Turns whatever the ``tokenizers`` library raises into a ValueError.

    Its panics are no Exceptions, and print pages to standard error before they arrive; where ``quiet``, those are dropped.
    """
    try:
        with _held_back() if quiet else contextlib.nullcontext():
            yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {error}.") from error


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Holds back what the process writes to its standard error; drops it if the body fails, writes it afterwards if not."""
    try:
        terminal = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    if sys.stderr:
        sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
        held.seek(0)
        with open(2, "wb", closefd=False) as stderr:
            stderr.write(held.read())


def _read_sentencepiece(path: Location, data: bytes | None) -> tuple[Callable[[str], list[int]], int, int, int | None, int]:
    try:
        source: dict[str, Any] = {"model_file": str(path)} if data is None else {"model_proto": data}
        processor = sentencepiece.SentencePieceProcessor(**source)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a readable SentencePiece model: {error}.") from error
    pad_id, eos_id = (_present(index, token, path) for index, token in ((processor.pad_id(), PAD), (processor.eos_id(), EOS)))
    vocab_size = processor.get_piece_size() + NUM_EXTRA_IDS
    special = {PAD: pad_id, EOS: eos_id, UNK: processor.unk_id()}
    special |= {f"<extra_id_{i}>": vocab_size - 1 - i for i in range(NUM_EXTRA_IDS)}
    boundary = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    def split(text: str) -> list[int]:
        parts = boundary.split(text.replace("\x85", " "))  # "next line": white space for the other library only
        return [index for part in parts for index in ([special[part]] if part in special else processor.encode(part))]

    return split, pad_id, eos_id, processor.unk_id(), vocab_size


def _present(index: int | None, token: str, path: Location) -> int:
    if index is None or index < 0:
        raise ValueError(f"{path} has no {token} token; expected a T5 vocabulary with {PAD} and {EOS}.")
    return index
