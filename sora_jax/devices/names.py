"""The names by which a user asks for a form of attention or a compute dtype.

Invariant: nothing here imports JAX, so that a command line can refuse a name at once.  What a name stands for on a device is
decided in ``attention_choice`` and ``compute_dtype``.
"""

AUTO = "auto"
DTYPES = (AUTO, "float32", "bfloat16")
ATTENTIONS = (AUTO, "dense", "chunked", "cudnn", "flash")


def check_attention(attention: str) -> None:
    """Refuses what names no form of attention.

    Raises:
      ValueError: names those that there are.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention is {attention!r}; expected one of {', '.join(ATTENTIONS)}.")
