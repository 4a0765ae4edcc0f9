"""Where compiled programs are kept, and what is said where they can't be."""

import math
import tempfile

import jax
import jax.numpy as jnp
import pytest

from convnext_jax import compilation_cache
from convnext_jax.compilation_cache import CacheHits, cache_directory, use_compilation_cache

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def _options():
    before = {name: jax.config.values[name] for name in OPTIONS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def tell_jax(directory):
    jax.config.update("jax_compilation_cache_dir", None if directory is None else str(directory))


def test_the_default_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tell_jax(None)
    use_compilation_cache()
    wanted = tmp_path / "cache" / "convnext_jax" / "compiled"
    assert cache_directory() == str(wanted)
    assert wanted.is_dir()
    assert list(wanted.iterdir()) == []

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wanted = tmp_path / "home" / ".cache" / "convnext_jax" / "compiled"
    assert compilation_cache.default_directory() == wanted


def test_what_jax_was_told_counts(tmp_path, caplog):
    tell_jax(tmp_path / "mine")
    use_compilation_cache()
    assert cache_directory() == str(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()
    tell_jax("gs://bucket/cache")
    use_compilation_cache()
    assert cache_directory() == "gs://bucket/cache"
    assert not caplog.text


@pytest.mark.parametrize(("option", "value"), [(OPTIONS[0], ""), (OPTIONS[1], False)])
def test_it_can_be_turned_off(option, value, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tell_jax(None)
    jax.config.update(option, value)
    use_compilation_cache()
    assert cache_directory() is None
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    tell_jax(tmp_path / "file" / "cache")
    use_compilation_cache()
    assert cache_directory() is None
    (record,) = caplog.records
    assert record.getMessage() == (
        f"compiled programs are not kept: {tmp_path / 'file' / 'cache'}, which cannot be written "
        "(Not a directory); JAX_COMPILATION_CACHE_DIR names another directory"
    )


def test_a_directory_that_can_only_be_read(tmp_path, caplog, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    tell_jax(tmp_path)
    use_compilation_cache()
    assert cache_directory() == str(tmp_path)
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == math.inf
    (record,) = caplog.records
    assert record.getMessage().startswith(f"compiled programs are only read from {tmp_path}, which")

    # Other processes than the first would not write anyway.
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    caplog.clear()
    use_compilation_cache()
    assert not caplog.records


def test_hits_are_counted():
    x = jnp.ones((3, 5))
    jax.block_until_ready(x)
    with CacheHits() as first:
        assert not first.all
        jax.jit(lambda x: x * 17.5 + 0.125)(x)
    with CacheHits() as second:
        jax.jit(lambda x: x * 17.5 + 0.125)(x)
    assert (first.requests, first.hits, first.all) == (1, 0, False)
    assert (second.requests, second.hits, second.all) == (1, 1, True)
    jax.jit(lambda x: x * 18.5 + 0.125)(x)
    assert second.requests == 1
