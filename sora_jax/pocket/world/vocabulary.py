"""The word-level tokenizer of the pocket model, written as a ``tokenizer.json``.

Invariant: ids follow from the grammar alone: padding 0, end 1, unknown 2, then the words in the order of
``captions.words``.  Case and punctuation do not matter.  Reading the file is ``sora_jax.inputs.tokenizer``'s work.
"""

from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from sora_jax.config import pocket
from sora_jax.inputs.tokenizer import EOS, PAD, UNK
from sora_jax.pocket.world import captions

MAX_SIZE = pocket.t5.vocab_size


def write_tokenizer(path: str | Path) -> None:
    """Writes the pocket model's ``tokenizer.json``.

    Raises:
      ValueError: the grammar has more words than the embedding has rows.
    """
    vocabulary = {token: index for index, token in enumerate((PAD, EOS, UNK, *captions.words()))}
    if len(vocabulary) > MAX_SIZE:
        raise ValueError(
            f"The grammar needs {len(vocabulary)} tokens; expected at most {MAX_SIZE}: drop words or raise MAX_SIZE."
        )
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    punctuation = normalizers.Replace(Regex(r"[^a-z0-9]+"), " ")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), punctuation]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, vocabulary[EOS])])
    tokenizer.add_special_tokens([PAD, EOS, UNK])
    tokenizer.save(str(path))
