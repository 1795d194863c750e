"""Core ML: one package for every stage, for iOS 18, its weights baked in and shared by the functions of the package.

A pair of STDiT3 blocks is one package with the functions ``full`` and ``merged``, and two more for every further size; they
differ in their programs and read the same weights.  Inputs have the names of the stage's inputs; an output has the stage's name
with the suffix ``_out``, because in Core ML no input and output may share a name.  Inputs and outputs are float32
(token ids int32) whatever the precision inside, unless float16 is asked for.

Invariant: weights are compressed before functions are merged (coremltools refuses the other order).  Nothing here was compiled
or run on Apple hardware; `coreml_open` runs what lies on the disk, by the interpreter of `mil_check`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sora_jax.config import FLOAT32, DTypePolicy
from sora_jax.export.cut import FUSED
from sora_jax.export.entries import ArtefactEntry, Precision, Weights
from sora_jax.export.mixed_bits import ByContent
from sora_jax.export.opening import require
from sora_jax.export.palettes import nearest_table
from sora_jax.export.program import Function, Stage
from sora_jax.export.targets import Options
from sora_jax.storage.quantisation import is_quantised

SUFFIX = ".mlpackage"
OUTPUT_SUFFIX = "_out"
PACKAGES = ("coremltools", "stablehlo-coreml")
NOTE = "The Core ML packages were checked on Linux by an interpreter; nothing was compiled or run on Apple hardware."

# Constants of fewer elements are left alone (biases, tables of modulation and of positions), unless a model is so narrow
# that its matrices are smaller still.
_THRESHOLD = 500_000
_READ_AS_WEIGHTS = ("gather", "linear", "matmul")
_BLOCK = 32
_FUSION = "common::fuse_attention_to_sdpa"


def check_options(options: Options) -> None:
    """Refuses to start without coremltools; Core ML has every precision and every kind of weights."""
    require("coreml", "coremltools", "stablehlo_coreml")


def policy(options: Options) -> DTypePolicy:
    """Returns the dtypes stages are built with: float32 in a form that stays within float16's range when converted."""
    return dataclasses.replace(FLOAT32, half_range=True)


def save(stage: Stage, params: Mapping[str, np.ndarray], folder: Path, options: Options) -> dict[str, ArtefactEntry]:
    """Writes the package of a stage; see `targets.Target`.  A package of one function calls it ``main``."""
    package = folder / f"{stage.name}{SUFFIX}"
    names = [function.name for function in stage.functions]
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{stage.name}.") as scratch, _quiet():
        parts = [Path(scratch) / f"{i}{SUFFIX}" for i in range(len(names))]
        for function, part in zip(stage.functions, parts, strict=True):
            _save_function(function, params, part, stage=stage, options=options)
        whole = (
            parts[0] if len(parts) == 1 else _merged(dict(zip(names, parts, strict=True)), Path(scratch) / f"merged{SUFFIX}")
        )
        _describe(whole, stage, params, options)
        shutil.move(whole, package)
    called = ["main"] if len(names) == 1 else names
    return {
        name: {"file": package.name, "function": function, "output_suffix": OUTPUT_SUFFIX}
        for name, function in zip(names, called, strict=True)
    }


def _save_function(function: Function, params: Mapping[str, np.ndarray], path: Path, *, stage: Stage, options: Options) -> None:
    fused = options.fuse_attention if function.form is None else function.form == FUSED
    model = converted(function, params, precision=options.precision_of(stage), fuse_attention=fused)
    if options.weights_of(stage) != "float":
        chosen = ByContent(params, options.widths)
        model = compressed(model, options.weights_of(stage), weight_threshold(params), chosen)
    model.save(str(path))


def converted(
    function: Function, params: Mapping[str, np.ndarray], *, precision: Precision, fuse_attention: bool = True
) -> Any:
    """Returns the Core ML model of one function of a stage, with named inputs and outputs."""
    import coremltools
    import stablehlo_coreml

    from sora_jax.export import coreml_pass

    program = _program(function, params)
    pipeline = stablehlo_coreml.build_pass_pipeline()
    if precision == "float16":
        pipeline.passes = [coreml_pass.NAME if name == coreml_pass.REPLACED else name for name in pipeline.passes]
    if not fuse_attention:
        pipeline.remove_passes([_FUSION])
    chosen = {"float32": coremltools.precision.FLOAT32, "float16": coremltools.precision.FLOAT16}
    return coremltools.convert(
        program,
        source="milinternal",
        pass_pipeline=pipeline,
        compute_precision=chosen[precision],
        minimum_deployment_target=coremltools.target.iOS18,
        skip_model_load=True,
    )


def _program(function: Function, params: Mapping[str, np.ndarray]) -> Any:
    """Returns the MIL program; JAX's copies of the weights, several times their size, are released before the conversion."""
    import coremltools
    import stablehlo_coreml

    lowered = jax.jit(_positional(function, params), keep_unused=True).lower(*function.inputs.values())
    target = coremltools.target.iOS18
    program = stablehlo_coreml.convert(lowered.compiler_ir("stablehlo"), minimum_deployment_target=target)
    _name_outputs(program, [name + OUTPUT_SUFFIX for name in function.outputs])
    return program


def _positional(function: Function, params: Mapping[str, np.ndarray]) -> Any:
    """Returns the stage's function with the weights inside; its signature gives the converter the names of the inputs."""
    weights = jax.device_put(dict(params))

    def body(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        outputs = function.call(weights, **dict(zip(function.inputs, inputs, strict=True)))
        return tuple(outputs[name] for name in function.outputs)

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in function.inputs]
    body.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by inspect, and so by JAX
    return body


def _name_outputs(program: Any, names: list[str]) -> None:
    """Names the outputs, none of which may be a constant: the position bias of a text of fixed length is one."""
    main = program.functions["main"]
    outputs = list(main.outputs)
    with main:
        outputs = [_depending_on(next(iter(main.inputs.values())), out) if out.val is not None else out for out in outputs]
    main.set_outputs(outputs)
    for output, name in zip(outputs, names, strict=True):
        output.name = name


def _depending_on(given: Any, constant: Any) -> Any:
    """Returns the constant plus a zero that is computed at run time; the converter would remove an identity."""
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import types

    dtype = types.builtin_to_string(constant.dtype)
    least = Builder.reduce_min(x=given, keep_dims=True)
    return Builder.add(x=constant, y=Builder.cast(x=Builder.less(x=least, y=least), dtype=dtype))


def weight_threshold(params: Mapping[str, np.ndarray]) -> int:
    """Returns the number of elements above which a constant is a matrix to compress."""
    sizes = [math.prod(array.shape) for name, array in params.items() if is_quantised(name, array.shape)]
    return min([_THRESHOLD, *(size - 1 for size in sizes)])


def compressed(model: Any, weights: Weights, threshold: int, chosen: ByContent | None = None) -> Any:
    """Returns a model whose matrices are compressed.

    ``int8``: a scale for every output channel (every row of an embedding); ``lut6``: a table of 64 values for every matrix;
    ``int4``: a scale for every 32 inputs of an output channel; ``mixed``: a table whose size is chosen for every matrix.
    """
    from coremltools.optimize import coreml

    if weights in ("lut6", "mixed"):
        # coremltools' own k-means needs scikit-learn
        find = functools.partial(nearest_table, entries=64) if chosen is None or weights == "lut6" else chosen.table
        config = coreml.OpPalettizerConfig(mode="custom", lut_function=find, weight_threshold=threshold)
    else:
        granularity = "per_channel" if weights == "int8" else "per_block"
        config = coreml.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype=weights, granularity=granularity, block_size=_BLOCK, weight_threshold=threshold
        )
    matrices = coreml.OptimizationConfig(op_type_configs=dict.fromkeys(_READ_AS_WEIGHTS, config))
    compress = coreml.palettize_weights if weights in ("lut6", "mixed") else coreml.linear_quantize_weights
    return compress(model, matrices)


def _merged(parts: Mapping[str, Path], path: Path) -> Path:
    """Returns the package that holds every part as a function, equal weights once."""
    from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction

    descriptor = MultiFunctionDescriptor()
    for name, part in parts.items():
        descriptor.add_function(str(part), src_function_name="main", target_function_name=name)
    descriptor.default_function_name = next(iter(parts))
    save_multifunction(descriptor, str(path))
    return path


def _describe(package: Path, stage: Stage, params: Mapping[str, np.ndarray], options: Options) -> None:
    """Writes the metadata into a package, where Xcode shows it."""
    from coremltools.models.utils import load_spec

    spec = load_spec(str(package))
    metadata = spec.description.metadata
    functions = ", ".join(function.name for function in stage.functions)
    metadata.shortDescription = f"{stage.name} of {options.metadata.get('model', 'a sora_jax model')}, functions: {functions}"
    metadata.license = options.metadata.get("licence", "")
    own = {
        "stage": stage.name,
        "sizes": ", ".join(dict.fromkeys(key for function in stage.functions for key in function.sizes)),
        "precision": options.precision_of(stage),
        "weights": options.weights_of(stage),
        "weights_sha256": _sha256(params),
        "note": NOTE,
    }
    metadata.userDefined.update({**options.metadata, **own})
    (package / "Data/com.apple.CoreML/model.mlmodel").write_bytes(spec.SerializeToString())


def _sha256(params: Mapping[str, np.ndarray]) -> str:
    """Returns the hash of the source's weights, names and all, as they were before any compression."""
    digest = hashlib.sha256()
    for name, array in sorted(params.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps coremltools' progress bars and its remarks about not being on a Mac off the terminal."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
