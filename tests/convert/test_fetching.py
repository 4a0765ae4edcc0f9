"""Downloads from a server on this machine, and from a hub that is a directory."""

import hashlib
import http.server
import json
import logging
import re
import shutil
import sys
import threading
import types

import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_files import tensor, write_zip

from convnext_jax.convert.fetching import cache_directory
from convnext_jax.convert.reading import read_weights
from convnext_jax.errors import UserError


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.end_headers()
            return
        path = self.server.root / re.split("/|%2F", self.path.partition("?")[0])[-1]
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        self.send_response(200)
        if not self.path.startswith("/unsized/"):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:-100] if self.path.startswith("/cut/") else data)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    instance = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    instance.root = tmp_path_factory.mktemp("served")
    instance.requests = []
    instance.url = f"http://127.0.0.1:{instance.server_port}"
    write_zip(instance.root / "w.pth", {"w": tensor("0", np.ones((64, 64), np.float32))})
    shutil.copy(instance.root / "w.pth", instance.root / "convnext_tiny-983f1562.pth")
    (instance.root / "page.pth").write_text("<html>")
    thread = threading.Thread(target=instance.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield instance
    instance.shutdown()
    instance.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVNEXT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_in(directory):
    return [path for path in directory.rglob("*") if path.is_file()]


def test_a_url_is_downloaded_once(server, cache, caplog):
    server.requests.clear()
    url = f"{server.url}/some/where/w.pth?download=true"
    with caplog.at_level(logging.INFO, logger="convnext_jax"):
        read = read_weights(url)
    assert "downloading" in caplog.text
    assert "download=true" not in caplog.text
    np.testing.assert_array_equal(read.tensors["w"], np.ones((64, 64)))
    assert read.source == url
    assert read.files[0].name == "w.pth"
    assert cache in read.files[0].parents
    assert read_weights(url).files == read.files
    assert len(server.requests) == 1
    assert files_in(cache) == [read.files[0]]


def test_redirects_and_unknown_sizes(server):
    for way in ("moved", "unsized", "moved/unsized"):
        assert read_weights(f"{server.url}/{way}/w.pth").tensors["w"].shape == (64, 64)


def test_the_cache_can_be_given(server, tmp_path):
    read = read_weights(f"{server.url}/w.pth", cache_dir=tmp_path / "own")
    assert tmp_path / "own" in read.files[0].parents


def test_where_the_cache_is(monkeypatch, tmp_path, cache):
    assert cache_directory() == cache
    monkeypatch.delenv("CONVNEXT_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "convnext_jax"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("cut/w.pth", r"was cut off after [\d,]+ of [\d,]+ bytes"),
        ("none.pth", "answers 404"),
        ("page.pth", "is a web page"),
        ("convnext_tiny-983f1562.pth", "not 983f1562"),
    ],
)
def test_a_bad_download_is_not_kept(server, cache, path, message):
    with pytest.raises(UserError, match=message) as info:
        read_weights(f"{server.url}/{path}")
    assert "\n" not in str(info.value)
    assert files_in(cache) == []


def test_the_hash_of_a_download_is_checked_before_it_is_kept(server, cache):
    actual = hashlib.sha256((server.root / "w.pth").read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"{actual}, not {'0' * 64}"):
        read_weights(f"{server.url}/w.pth", sha256="0" * 64)
    assert files_in(cache) == []
    assert read_weights(f"{server.url}/w.pth", sha256=actual).sha256 == actual
    with pytest.raises(UserError, match="delete it and download it again"):
        read_weights(f"{server.url}/w.pth", sha256="0" * 64)


def test_names_in_a_url_stay_in_the_cache(server, cache):
    read = read_weights(f"{server.url}/x/..%2F..%2Fw.pth?a=/b/w.pth")
    assert read.files[0].name == "_.._w.pth"
    assert cache.resolve() in read.files[0].resolve().parents


def test_secrets_in_a_url_are_not_shown(server):
    address = server.url.replace("http://", "http://user:secret@")
    with pytest.raises(UserError) as info:
        read_weights(f"{address}/none.pth?token=secret")
    assert "secret" not in str(info.value)


def test_no_server(cache):
    with pytest.raises(UserError, match="cannot be downloaded"):
        read_weights("http://127.0.0.1:1/w.pth")
    with pytest.raises(UserError, match="neither a path nor of a kind that is fetched"):
        read_weights("s3://bucket/w.pth")
    assert files_in(cache) == []


def test_a_cache_that_cannot_be_written(server, cache):
    cache.write_text("a file in its place")
    with pytest.raises(UserError, match="set CONVNEXT_JAX_CACHE"):
        read_weights(f"{server.url}/w.pth")


def test_file_urls(tmp_path):
    path = write_zip(tmp_path / "a b.pth", {"w": tensor("0", np.ones(3, np.float32))})
    assert read_weights(path.as_uri()).files == (path,)


class Missing(Exception):  # noqa: N818
    pass


class MissingHere(Missing):
    pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one repository, by the part of huggingface_hub's interface that is used."""
    root = tmp_path / "hub"
    root.mkdir()
    errors = types.ModuleType("huggingface_hub.errors")
    errors.EntryNotFoundError = Missing
    errors.LocalEntryNotFoundError = MissingHere
    for name in ("RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError"):
        setattr(errors, name, type(name, (OSError,), {}))
    asked = []

    def hf_hub_download(repo_id, filename, *, revision, cache_dir, local_files_only):
        asked.append((repo_id, filename, revision, local_files_only))
        if repo_id != "timm/convnext":
            raise errors.RepositoryNotFoundError("404\nwith a long page")
        if revision == "offline":
            raise MissingHere
        if not (root / filename).is_file():
            raise Missing
        return str(root / filename)

    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download, module.errors = hf_hub_download, errors
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return types.SimpleNamespace(root=root, asked=asked)


def test_hub_names(hub):
    write_zip(hub.root / "pytorch_model.bin", {"w": tensor("0", np.ones(3, np.float32))})
    (hub.root / "config.json").write_text('{"num_classes": 1000}')
    read = read_weights("hf://timm/convnext@v1.0%2Fa")
    assert read.files == (hub.root / "pytorch_model.bin",)
    assert read.metadata["config"] == {"num_classes": 1000}
    assert {revision for _, _, revision, _ in hub.asked} == {"v1.0/a"}
    save_file({"w": np.zeros(3, np.float32)}, hub.root / "model.safetensors")
    assert read_weights("hf://timm/convnext").files == (hub.root / "model.safetensors",)
    read = read_weights("hf://timm/convnext/pytorch_model.bin")
    assert read.files == (hub.root / "pytorch_model.bin",)


def test_a_clip_repository(hub):
    write_zip(hub.root / "open_clip_pytorch_model.bin", {"w": tensor("0", np.ones(3, np.float32))})
    (hub.root / "open_clip_config.json").write_text('{"model_cfg": {}}')
    read = read_weights("hf://timm/convnext")
    assert read.files == (hub.root / "open_clip_pytorch_model.bin",)
    assert read.metadata["open_clip_config"] == {"model_cfg": {}}


def test_a_sharded_repository_in_a_folder(hub):
    folder = hub.root / "half"
    folder.mkdir()
    save_file({"w": np.zeros(3, np.float16)}, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    read = read_weights("hf://timm/convnext/half/model.safetensors.index.json")
    assert read.tensors["w"].dtype == np.float16
    asked = [name for _, name, _, _ in hub.asked]
    assert asked[1] == "half/model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://timm/convnext", "has none of model.safetensors"),
        ("hf://timm/convnext@offline", "the hub cannot be reached"),
        ("hf://timm/other", "no such repository"),
        ("hf://convnext", "is no hub name"),
        ("hf://timm/convnext@a b", "is no hub name"),
    ],
)
def test_hub_names_that_fail(hub, source, message):
    with pytest.raises(UserError, match=message) as info:
        read_weights(source)
    assert "\n" not in str(info.value)
    # Without a connection each further try would wait for the library's retries.
    assert [local for *_, local in hub.asked[1:]].count(False) == (
        0 if "offline" in source else max(len(hub.asked) - 1, 0)
    )


def test_without_the_hub_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'convnext-jax\[hub\]'"):
        read_weights("hf://timm/convnext_tiny.fb_in1k")


@pytest.mark.parity
def test_the_hub_library_itself_without_a_network(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the hub cannot be reached"):
        read_weights("hf://timm/convnext_tiny.fb_in1k", cache_dir=tmp_path)
