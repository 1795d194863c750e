"""What is exported: functions in fixed shapes, programs of functions, and stages, which are programs with their weights.

A stage is what a host program loads and unloads as one; several stages (all pairs of blocks, all T5 blocks) share a program
and differ in their weights only.  A host keeps one dictionary of named arrays, hands each function the inputs it names and
puts its outputs back, so an output named like an input replaces it.

Invariant: a function is a network's own forward between named plain arrays.  Which stages a model has is decided in `stages`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.export import forwards
from sora_jax.export.phases import base_name
from sora_jax.export.size import Size
from sora_jax.storage.checkpoint import flatten, read_layer
from sora_jax.storage.directory import Manifest
from sora_jax.storage.reader import Reader

Specs = Mapping[str, jax.ShapeDtypeStruct]
Shells = Mapping[str, Any]  # modules without values, by the prefix of their parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
    """One fixed-shape function of a stage.

    Attributes:
      name: unique within the stage; the variant's name, for further sizes followed by the size, for further forms of attention
        by the form.
      variant: what it computes: ``main``; ``full`` or ``merged`` of a pair; ``frames_17`` of a temporal codec.
      sizes: keys of the sizes it serves (see `Size`); of a text stage all of them.
      call: ``call(params, **inputs) -> outputs``, params by local name.
      inputs: shapes and dtypes by name, in order.
      outputs: likewise.
      form: its form of attention, where a stage has several; None: it has one.
    """

    name: str
    variant: str
    sizes: tuple[str, ...]
    call: Callable[..., dict[str, jax.Array]]
    inputs: Specs
    outputs: Specs
    form: str | None = None

    @property
    def base_name(self) -> str:
        """The name without the form: functions of one base compute the same."""
        return base_name(self.name, self.form)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What stages of the same computation share.

    Attributes:
      name: for example ``stdit3_pair``.
      abstract: shape and dtype of every parameter by local name, as the functions expect them.
      functions: at least one.
      keep_float32: its arithmetic has no meaning in float16 (angles of times up to 1000).
    """

    name: str
    abstract: Specs
    functions: tuple[Function, ...]
    keep_float32: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A unit of loading: a program and the weights it runs on.

    Attributes:
      name: ``t5_block_00``, ``stdit3_pair_00``, ...; also the stem of its files.
      program: what it computes.
      network: ``t5``, ``stdit3`` or ``vae``: where its parameters are stored.
      layers: the layers of the network that hold its parameters.
      parameters: flat name in the network by local name.
    """

    name: str
    program: Program
    network: str
    layers: tuple[str, ...]
    parameters: Mapping[str, str]

    @property
    def functions(self) -> tuple[Function, ...]:
        """The functions of its program."""
        return self.program.functions

    def function(self, name: str) -> Function:
        """Returns the function of that name."""
        return next(function for function in self.functions if function.name == name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """What becomes a function: its body for one size, and where the body's modules differ from the program's, its own.

    Attributes:
      name: see `Function.variant`.
      size: the size of video.
      body: ``body(modules, **inputs) -> outputs``.
      inputs: shapes and dtypes by name.
      shells: modules without values; None: the program's.
      form: see `Function.form`; the first form of a program is left out of the names.
    """

    name: str
    size: Size
    body: Callable[..., dict[str, jax.Array]]
    inputs: Specs
    shells: Shells | None = None
    form: str | None = None


def load_parameters(manifest: Manifest, stage: Stage) -> dict[str, np.ndarray]:
    """Returns a stage's parameters by local name, in the dtype it expects, reading its layers only; int8 is multiplied out.

    Raises:
      ModelDirectoryError: a parameter is missing or does not match its checksum.
    """
    reader, flat = Reader(manifest), {}
    for layer in stage.layers:
        flat.update(read_layer(reader, layer, dtype="float32"))
    return {
        local: flat[name].astype(stage.program.abstract[local].dtype, copy=False) for local, name in stage.parameters.items()
    }


def make_shell(build: Callable[[nnx.Rngs], Any]) -> Any:
    """Returns a module without values."""
    return jax.eval_shape(lambda: build(nnx.Rngs(0)))


def make_stage(name: str, program: Program, network: str, prefixes: Mapping[str, str]) -> Stage:
    """Returns a stage; ``prefixes`` maps its layers to the prefix their parameters have in the program."""
    parameters: dict[str, str] = {}
    for layer, prefix in prefixes.items():
        start = len(prefix) + 1 if prefix else 0
        mine = [local for local in program.abstract if local.startswith(prefix + "." if prefix else "")]
        parameters |= {local: f"{layer}.{local[start:]}" for local in mine}
    return Stage(name=name, program=program, network=network, layers=tuple(prefixes), parameters=parameters)


def make_program(name: str, shells: Shells, variants: Sequence[Variant], *, keep_float32: bool = False) -> Program:
    """Returns a program whose functions are the variants; sizes with the same shapes share one."""
    abstract = _abstract(shells)
    functions: dict[Any, Function] = {}
    for variant in variants:
        key = (variant.name, variant.form, *((input_name, spec.shape) for input_name, spec in variant.inputs.items()))
        if key in functions:
            functions[key] = dataclasses.replace(functions[key], sizes=(*functions[key].sizes, variant.size.key))
            continue
        taken = {(one.variant, one.form) for one in functions.values()}
        call = forwards.bound(variant.body, shells if variant.shells is None else variant.shells)
        functions[key] = Function(
            name="_".join(_name(variant, first_size=(variant.name, variant.form) not in taken, first_form=variants[0].form)),
            variant=variant.name,
            sizes=(variant.size.key,),
            call=call,
            inputs=variant.inputs,
            outputs=jax.eval_shape(lambda params, given, call=call: call(params, **given), abstract, variant.inputs),
            form=variant.form,
        )
    return Program(name=name, abstract=abstract, functions=tuple(functions.values()), keep_float32=keep_float32)


def _name(variant: Variant, *, first_size: bool, first_form: str | None) -> Iterator[str]:
    yield variant.name
    if not first_size:
        yield variant.size.key
    if variant.form is not None and variant.form != first_form:
        yield variant.form


def with_half_boundary(program: Program) -> Program:
    """Returns the program with float16 in place of float32 inputs and outputs; inside it computes as before."""
    functions = tuple(
        dataclasses.replace(one, call=_half_call(one), inputs=_halved(one.inputs), outputs=_halved(one.outputs))
        for one in program.functions
    )
    return dataclasses.replace(program, functions=functions)


def _half_call(function: Function) -> Callable[..., dict[str, jax.Array]]:
    def call(params: Mapping[str, jax.Array], **inputs: jax.Array) -> dict[str, jax.Array]:
        widened = {name: inputs[name].astype(spec.dtype) for name, spec in function.inputs.items()}
        outputs = function.call(params, **widened)
        return {name: outputs[name].astype(spec.dtype) for name, spec in _halved(function.outputs).items()}

    return call


def _halved(specs: Specs) -> dict[str, jax.ShapeDtypeStruct]:
    halves = {name: jnp.float16 if spec.dtype == jnp.float32 else spec.dtype for name, spec in specs.items()}
    return {name: jax.ShapeDtypeStruct(spec.shape, halves[name]) for name, spec in specs.items()}


def _abstract(shells: Shells) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of every parameter by local name: that of its module below the module's prefix."""
    return {
        f"{prefix}.{name}" if prefix else name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for prefix, shell in shells.items()
        for name, leaf in flatten(shell).items()
    }
