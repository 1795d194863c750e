"""Whether the arrays of a manifest fit together: what flows from stage to stage, as a host runs the phases.

A host keeps one dictionary of arrays: an output replaces the array of its name, an input takes the array of its name.

Invariant: reads the manifest alone.  An array that no stage of the export makes (a caption, where the text encoder was not
exported) is taken as it is declared.
"""

from collections.abc import Mapping

from sora_jax.export.entries import ExportManifest, FunctionEntry, SizeEntry, TensorEntry
from sora_jax.export.phases import stage_function
from sora_jax.export.rows import has_rows

CONDITIONS = ("fps_B", "height_px_B", "width_px_B")

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


class ContradictionError(ValueError):
    """Two parts of a manifest exclude each other."""


def check_wiring(manifest: ExportManifest, size: SizeEntry) -> None:
    """Refuses a manifest in which an array of a size has two shapes.

    Raises:
      ContradictionError: names the array and both shapes.
    """
    frames, rows, columns, channels = size["latents"]
    length = (1, manifest["tokens"]["length"])
    flow = _Flow(manifest, size["key"])
    known = flow.after("text", "main", {"ids_BL": length, "mask_BL": length, **dict.fromkeys(CONDITIONS, (1,))})
    guidance_rows = manifest.get("guidance_rows", 2)
    known = flow.after("caption", "main", known)
    known = {name: (guidance_rows, *shape[1:]) if has_rows(name) else shape for name, shape in known.items()}
    known |= {"z_BTHWC": (1, frames, rows, columns, channels), "t_B": (1,), "frame_mask_BT": (1, frames)}
    for variant in ("full", "merged") if frames > 1 else ("full",):
        made = flow.after("step", variant, known)
        _expect("v_RTHWC", made.get("v_RTHWC"), (guidance_rows, frames, rows, columns, channels))
    for function in manifest["sampler"]["functions"] if manifest["sampler"] else ():
        if size["key"] in function["sizes"]:
            made = _after(f"sampler {function['name']}", function, known)
            _expect("z_BTHWC", made.get("z_BTHWC"), known["z_BTHWC"])
    for chunk in size["chunks"]:
        z = (1, chunk["latents"], rows, columns, channels)
        made = flow.after("decode_chunk", chunk["variant"], {"z_BTHWC": z})
        flow.after("decode_frame", "main", _with_frames(made, chunk["frames"], 1))
        made = flow.after("encode_frame", "main", {"frames_Bthw3": (1, 1, size["height"], size["width"], 3)})
        made = flow.after("encode_chunk", chunk["variant"], _with_frames(made, 1, chunk["frames"]))
        _expect("z_BTHWC", made.get("z_BTHWC"), z)


class _Flow:
    """The phases of a manifest, run on shapes of one size."""

    def __init__(self, manifest: ExportManifest, size: str):
        self.size = size
        self.stages = {stage["name"]: stage for stage in manifest["stages"]}
        self.phases = {phase["name"]: phase for phase in manifest["phases"]}

    def after(self, phase: str, variant: str, shapes: Shapes) -> Shapes:
        """Returns the shapes after every stage of a phase has run; without the phase they stay."""
        for name in self.phases[phase]["stages"] if phase in self.phases else ():
            try:
                function = stage_function(self.stages[name], self.size, variant)
            except ValueError as error:
                raise ContradictionError(str(error)) from None
            shapes = _after(f"stage {name} {function['name']}", function, shapes)
        return shapes


def _after(where: str, function: FunctionEntry, shapes: Shapes) -> Shapes:
    for tensor in function["inputs"]:
        found = shapes.get(tensor["name"])
        if found is not None and found != fixed_shape(tensor):
            raise ContradictionError(f"{where} takes {tensor['name']} as {fixed_shape(tensor)}, and gets {found}.")
    return {**shapes, **{tensor["name"]: fixed_shape(tensor) for tensor in function["outputs"]}}


def _with_frames(shapes: Mapping[str, Shape], made: int, taken: int) -> Shapes:
    """Returns the shapes with spatial latents of another number of frames; so many must have been made."""
    found = shapes.get("x_BtHWC")
    if found is None:
        return dict(shapes)
    _expect("x_BtHWC", found, (1, made, *found[2:]))
    return {**shapes, "x_BtHWC": (1, taken, *found[2:])}


def _expect(name: str, found: Shape | None, expected: Shape) -> None:
    if found is not None and found != expected:
        raise ContradictionError(f"{name} is made as {found}, expected {expected}.")


def fixed_shape(tensor: TensorEntry) -> Shape:
    """Returns the lengths of an array; a host of fixed shapes knows no letters.

    Raises:
      ContradictionError: a length is a letter.
    """
    lengths = tuple(length for length in tensor["shape"] if isinstance(length, int))
    if len(lengths) != len(tensor["shape"]):
        raise ContradictionError(f"{tensor['name']} has no fixed shape: {tensor['shape']}.")
    return lengths
