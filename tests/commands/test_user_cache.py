"""Where compiled programs are kept: never where somebody else could put one."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from sora_jax.commands import user_cache


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777, 0o2775])
def test_a_folder_that_others_may_write_is_refused(tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(
        ValueError, match=r"^others may write programs into .*shared, to be executed here: empty it and chmod go-w"
    ):
        user_cache.use_compile_cache(str(folder))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
    with pytest.warns(UserWarning, match="^compiled programs are not kept: others may write"):
        user_cache.use_compile_cache(None)
    assert jax.config.jax_compilation_cache_dir is None
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_cache.os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ValueError, match=r"belongs to another user \(number \d+\), whose programs would be executed here"):
        user_cache.use_compile_cache(str(tmp_path))


def test_a_new_folder_is_the_users_alone_whatever_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = os.umask(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            user_cache.use_compile_cache(None)
    finally:
        os.umask(before)
    folder = tmp_path / "home" / "sora_jax" / "compiled"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_off_is_off_although_the_environment_names_a_folder(tmp_path: Path) -> None:
    """JAX reads the variable by itself."""
    script = (
        "from sora_jax.commands import user_cache; user_cache.use_compile_cache('off'); import jax; jax.jit(lambda x: x + 1)(1)"
    )
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert not os.listdir(tmp_path)
    subprocess.run([sys.executable, "-c", script.replace("'off'", "None")], env=environment, check=True)
    assert os.listdir(tmp_path)
