"""The package as its users meet it: what importing it loads, its version, and the files that come with it."""

import importlib.metadata
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import convert_weights
import sora_jax

ROOT = Path(__file__).parents[1]


def modules(package) -> list[str]:
    found = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    return [name for name in found if not name.endswith("__main__")]


def test_no_module_imports_torch():
    # these are built on coremltools, an optional extra that imports torch where it finds it
    coreml = ("sora_jax.export.coreml_pass", "sora_jax.export.mil_check", "sora_jax.export.mil_package")
    page = ("sora_jax.commands.web.layout",)  # built on gradio, an optional extra as well
    names = [name for name in (*modules(sora_jax), *modules(convert_weights)) if name not in (*coreml, *page)]
    assert "sora_jax.export.coreml" in names
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "sys.exit(', '.join({'torch', 'transformers', 'diffusers', 'tensorflow'} & sys.modules.keys()) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_package_loads_no_network():
    program = "import sora_jax, sys; sys.exit(', '.join({'jax', 'flax', 'av', 'tokenizers'} & sys.modules.keys()) or None)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_public_names_resolve():
    for name in sora_jax.__all__:
        assert getattr(sora_jax, name) is not None
    with pytest.raises(AttributeError, match="'sora_jax' has no attribute 'pipline'"):
        _ = sora_jax.pipline


def test_one_version():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in settings["project"]["dynamic"]
    assert f'"{sora_jax.__version__}"' in (ROOT / settings["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8")
    assert f"version: {sora_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {sora_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_both_packages_declare_their_types():
    assert all((ROOT / package / "py.typed").is_file() for package in ("sora_jax", "convert_weights"))


def test_the_installed_package_is_complete():
    files = {str(path) for path in importlib.metadata.files("sora_jax") or ()}
    if not any(name.startswith("sora_jax/") for name in files):
        pytest.skip("sora_jax is installed in editable form, without files of its own; pip install . to test them")
    tracked = [path for package in ("sora_jax", "convert_weights") for path in (ROOT / package).rglob("*") if path.is_file()]
    expected = {str(path.relative_to(ROOT)) for path in tracked if "__pycache__" not in path.parts}
    assert expected <= files  # py.typed, the schema of manifests and the embedded model's weights among them
