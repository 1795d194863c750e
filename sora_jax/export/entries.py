"""The manifest's parts as types: what `manifest.read` returns, field by field.

Invariant: the fields are those of ``manifest.schema.json``, where each is explained; a test holds the two together.  Nothing
is read or computed here.
"""

from typing import Any, Literal, NotRequired, TypedDict

TargetName = Literal["stablehlo", "onnx", "coreml", "coreai"]
Precision = Literal["float32", "float16"]
Weights = Literal["float", "int8", "lut6", "int4", "mixed"]
Unload = Literal["after_use", "after_phase"]


class FileEntry(TypedDict):
    """A file of the export."""

    bytes: int
    sha256: str


class WeightsEntry(TypedDict):
    """How matrices are stored, here and in the model directory."""

    dtype: Weights
    stored_dtype: dict[str, str]
    dequantised: bool
    mean_bits: NotRequired[float]


class NetworkEntry(TypedDict):
    """A network of the exported model; ``config`` is its configuration as the model directory has it."""

    config: dict[str, Any]
    sha256: str


class ModelEntry(TypedDict):
    """Which model was exported."""

    name: str
    licence: str | None
    networks: dict[str, NetworkEntry]


class ScoresEntry(TypedDict):
    """What is appended to a prompt; None: nothing."""

    aes: float | None
    flow: float | None
    camera_motion: str | None


class TokensEntry(TypedDict):
    """How a prompt becomes ids."""

    length: int
    file: str | None
    scores: ScoresEntry


class ChunkEntry(TypedDict):
    """Frames that are decoded together."""

    frames: int
    latents: int
    variant: str


class SizeEntry(TypedDict):
    """A size of video that the export can make."""

    key: str
    num_frames: int
    height: int
    width: int
    latents: list[int]
    chunks: list[ChunkEntry]
    conditions: dict[str, float]
    shift: float
    times: list[float]


class LeapEntry(TypedDict):
    """When sampling leaps to its end."""

    mode: Literal["off", "static", "dynamic"]
    index: int | None
    tolerance: float
    min_share: float
    patience: int


class SamplingEntry(TypedDict):
    """The numbers of the loop."""

    num_steps: int
    num_timesteps: float
    guidance: float
    merge_steps: int
    leap: LeapEntry


class PhaseEntry(TypedDict):
    """Stages that are loaded and run one after the other."""

    name: str
    repeat: str
    stages: list[str]
    unload: Unload


class TensorEntry(TypedDict):
    """An input or output; a length that may be any is a letter."""

    name: str
    shape: list[int | str]
    dtype: str


class CheckEntry(TypedDict):
    """How exact one output was found to be."""

    case: str
    output: str
    measured: str
    psnr_db: float
    relative_l2: float
    floor_db: float
    ceiling_l2: float


class ArtefactEntry(TypedDict):
    """Where a function is; paths are relative to the manifest."""

    file: str
    weights: NotRequired[str]
    function: NotRequired[str]
    symbolic: NotRequired[str]
    output_suffix: NotRequired[str]


class ChunkedEntry(TypedDict):
    """An attention that is computed in chunks of at most ``queries`` queries."""

    part: str
    size: str
    attention: str
    queries: int


class FormEntry(TypedDict):
    """A form of attention of which every pair has functions, and the public reports that are the reason for it."""

    name: str
    reason: str
    reports: list[str]
    logits_limit_bytes: int


class AttentionEntry(TypedDict):
    """From how many bytes of logits on attention is chunked, and which is; and the forms, where pairs have several."""

    logits_limit_bytes: int
    chunked: list[ChunkedEntry]
    forms: NotRequired[list[FormEntry]]


class FunctionEntry(TypedDict):
    """A function of fixed shapes."""

    name: str
    variant: str
    sizes: list[str]
    artefact: ArtefactEntry
    inputs: list[TensorEntry]
    outputs: list[TensorEntry]
    checks: list[CheckEntry]
    vectors: NotRequired[str]
    attention: NotRequired[str]


class StageEntry(TypedDict):
    """What is loaded and unloaded as one."""

    name: str
    program: str
    network: str
    layers: list[str]
    precision: Precision
    peak_rss_bytes: int
    functions: list[FunctionEntry]
    bits: NotRequired[dict[str, int]]


class SamplerEntry(TypedDict):
    """The whole loop as one program."""

    peak_rss_bytes: int
    functions: list[FunctionEntry]


class VectorsEntry(TypedDict):
    """Test vectors of what a host does itself; those of functions stand with them."""

    host: str
    clip: str | None
    given: NotRequired[str | None]


class UnsealedManifest(TypedDict):
    """The whole file, as its content is put together."""

    format_version: int
    target: TargetName
    precision: Precision
    weights: WeightsEntry
    made_by: dict[str, str]
    model: ModelEntry
    tokens: TokensEntry
    sizes: list[SizeEntry]
    sampling: SamplingEntry
    attention: NotRequired[AttentionEntry]
    guidance_rows: NotRequired[int]
    pairs_per_package: NotRequired[int]
    phases: list[PhaseEntry]
    stages: list[StageEntry]
    sampler: SamplerEntry | None
    vectors: NotRequired[VectorsEntry]
    files: dict[str, FileEntry]
    total_bytes: int
    notes: list[str]


class ExportManifest(UnsealedManifest):
    """The whole file; ``sha256`` is that of its own text with zeros in place of these 64 digits."""

    sha256: str
