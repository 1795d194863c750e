"""How a network computes what could be large: static in every program, equal in its results, and chosen outside.

Invariant: with the default every array is made whole, in the form that exports hold.  Nothing is decided here.
"""

import dataclasses

from sora_jax.networks.attention import DENSE, Attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forms:
    """The forms of a network's computations.

    Attributes:
      attention: the form of every attention.
      hidden_bytes: most bytes of the hidden units of a transformer block's MLP, its widest array; with more tokens than that
        the block takes a portion at a time (see ``portions``).  Also most bytes of the features of decoded frames; with more
        the decoder computes bands of rows (see ``vae.bands``).  None: everything at once.
    """

    attention: Attention = DENSE
    hidden_bytes: int | None = None


WHOLE = Forms()
