"""What the compiling process says of a program; the compiler is that of this CPU, which has no limit of memory."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sora_jax.planning import child
from sora_jax.planning.programs import Program, programs
from sora_jax.planning.request import Request


def program(function: Any, *arguments: jax.ShapeDtypeStruct) -> Program:
    return Program(name="text", what="a test", counted="the whole program", times=1, function=function, arguments=arguments)


def test_the_sampler_has_one_loop_no_float64_and_no_transfer(tiny_model: Path) -> None:
    request = Request(model=str(tiny_model), target="v5e", options={"dtype": "float32"}, programs=("sampler",))
    (sampler,) = programs(request, "tpu")
    row = child.compiled(sampler, jax.devices("cpu")[0])
    assert (row["loops"], row["host_transfers"], row["collectives"]) == (1, [], {})
    assert "f64" not in row["dtypes"]
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sampler.arguments))
    assert row["argument_bytes"] == pytest.approx(weights, rel=0.02)
    assert row["refused"] is None
    assert row["operations"] > 0


def test_a_refusal_for_want_of_memory_is_an_outcome_and_another_fault_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = jax.make_jaxpr(lambda: 0)()

    def refusing(message: str) -> Any:
        def fail() -> None:
            raise jax.errors.JaxRuntimeError(message)

        traced = SimpleNamespace(jaxpr=nothing, lower=lambda: SimpleNamespace(compile=fail))
        return lambda function: SimpleNamespace(trace=lambda *arguments: traced)

    part, device = program(lambda x: x, jax.ShapeDtypeStruct((2,), jnp.float32)), jax.devices("cpu")[0]
    monkeypatch.setattr(
        child.jax, "jit", refusing("RESOURCE_EXHAUSTED: Ran out\n of memory: 48.57G exceeds 15.75G." + 999 * "x")
    )
    row = child.compiled(part, device)
    assert row["refused"].startswith("RESOURCE_EXHAUSTED: Ran out of memory: 48.57G exceeds 15.75G.")
    assert len(row["refused"]) == 400
    assert "peak_bytes" not in row
    monkeypatch.setattr(child.jax, "jit", refusing("INTERNAL: a fault"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        child.compiled(part, device)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(message: str) -> Any:
        def made(request: Request, platform: str) -> None:
            raise RuntimeError(message)

        return made

    monkeypatch.setattr(child.topologies, "get_topology_desc", lambda **names: SimpleNamespace(devices=["first"]))
    monkeypatch.setattr(child, "require_compiler", lambda platform: None)
    request = Request(model="open-sora-1.2", target="h100")
    for message in ("cuDNN not found.", "cuDNN is not detected."):
        monkeypatch.setattr(child, "programs", lacking(message))
        with pytest.raises(child.MissingCompilerError, match="pip install nvidia-cudnn-cu12, or ask for --attention chunked"):
            child.compile_all(request, print)
    monkeypatch.setattr(child, "programs", lacking("another fault"))
    with pytest.raises(RuntimeError, match="another fault"):
        child.compile_all(request, print)


@pytest.mark.parametrize(
    ("platform", "message"),
    [("tpu", r"pip install 'sora_jax\[ahead\]'"), ("cuda", f"jax-cuda12-plugin=={jax.__version__}")],
)
def test_a_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch, platform: str, message: str) -> None:
    monkeypatch.setattr(child.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(child.MissingCompilerError, match=message) as raised:
        child.require_compiler(platform)
    assert str(raised.value).startswith(sys.executable)
    assert "\n" not in str(raised.value)


def test_a_topology_that_the_compiler_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**names: str) -> None:
        raise RuntimeError(f"no topology {names['topology_name']}\nand more")

    monkeypatch.setattr(child.topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(child, "require_compiler", lambda platform: None)
    with pytest.raises(ValueError, match=r"^the compiler knows no v5e:3x5: no topology v5e:3x5$"):
        child.compile_all(Request(model="open-sora-1.2", target="v5e:3x5"), print)
