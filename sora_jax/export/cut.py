"""How the transformer is cut into stages and functions, for devices that cannot hold or move as much as this machine.

Invariant: every cut computes the same video; what differs is what a host loads, calls and keeps.  Nothing is traced here.
"""

import dataclasses
from collections.abc import Mapping

from sora_jax.export.entries import FormEntry, TargetName

FUSED, PLAIN, BREAKER, CHUNKED = "fused", "plain", "breaker", "chunked"
CHUNKED_LOGITS = 2**24  # bytes in float32 of one chunk's logits in the form that is always chunked

_FUSED_REASON = "Core ML's own fused operation; others report wrong results of it on the GPU for batches of 10 and more."
_PLAIN_REASON = "Single operations; others report that several large fused ones in a function run on the CPU, in silence."
_REASONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    FUSED: (_FUSED_REASON, ("https://github.com/apple/coremltools/issues/2650",)),
    PLAIN: (
        _PLAIN_REASON,
        ("https://github.com/kasper0406/stablehlo-coreml/pull/89",),
    ),
    BREAKER: (
        "Plain, with logits that are split and joined before the softmax, so that Core ML does not fuse them when it loads.",
        ("https://github.com/apple/coremltools/issues/2650",),
    ),
    CHUNKED: ("Plain, a few queries at a time: the logits of one attention are the largest value at large sizes.", ()),
}
FORMS: Mapping[TargetName, tuple[str, ...]] = {
    "stablehlo": (PLAIN, CHUNKED),
    "onnx": (PLAIN, CHUNKED),
    "coreml": (FUSED, PLAIN, BREAKER, CHUNKED),
    "coreai": (PLAIN, CHUNKED),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """How the transformer is cut.

    Attributes:
      guidance_rows: 2: a call computes the conditional and the unconditional row; 1: one of them, and is made twice.
      caption_once: the caption's projection is a stage of its own, which runs once a clip.
      pairs_per_package: pairs of blocks that are one stage and one call.
      attention_forms: forms of attention of which a pair has a function each, the first by the plain names; empty: one form.
    """

    guidance_rows: int = 2
    caption_once: bool = False
    pairs_per_package: int = 1
    attention_forms: tuple[str, ...] = ()

    @property
    def reference(self) -> "Cut":
        """The same stages with both rows and one form, as the pipeline computes them."""
        return dataclasses.replace(self, guidance_rows=2, attention_forms=())


WHOLE_CUT = Cut()


def make_cut(
    target: TargetName,
    *,
    guidance_rows: int,
    caption_once: bool,
    pairs_per_package: int,
    attention_forms: tuple[str, ...],
    depth: int,
) -> Cut:
    """Returns a cut of a transformer of ``depth`` pairs; one row at a time has the caption's projection for itself.

    Raises:
      ValueError: a number or a form is not possible.
    """
    if guidance_rows not in (1, 2):
        raise ValueError(f"guidance rows are {guidance_rows!r}; expected 2 in one call, or 1 in each of two.")
    divisors = [count for count in range(1, depth + 1) if depth % count == 0]
    if pairs_per_package not in divisors:
        allowed = ", ".join(map(str, divisors))
        raise ValueError(f"pairs per package is {pairs_per_package!r}; the model has {depth} pairs, expected one of {allowed}.")
    forms = tuple(dict.fromkeys(attention_forms))
    unknown = [form for form in forms if form not in FORMS[target]]
    if unknown:
        raise ValueError(f"target {target} has no attention form {unknown[0]!r}; it has {', '.join(FORMS[target])}.")
    return Cut(
        guidance_rows=guidance_rows,
        caption_once=caption_once or guidance_rows == 1,
        pairs_per_package=pairs_per_package,
        attention_forms=forms,
    )


def form_entries(cut: Cut, logits_limit: int) -> list[FormEntry]:
    """Returns the forms for a manifest, with the reports that are the reason for each."""
    entries: list[FormEntry] = []
    for form in cut.attention_forms:
        reason, reports = _REASONS[form]
        limit = limit_of(form, logits_limit)
        entries.append({"name": form, "reason": reason, "reports": list(reports), "logits_limit_bytes": limit})
    return entries


def limit_of(form: str | None, logits_limit: int) -> int:
    """Returns the bytes of logits beyond which a form is chunked."""
    return min(logits_limit, CHUNKED_LOGITS) if form == CHUNKED else logits_limit
