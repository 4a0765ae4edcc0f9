"""From what the user names, a path, a URL or a hub name, to a path on this machine."""

import hashlib
import http.client
import logging
import os
import re
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO

from convnext_jax.convert.format_error import FormatError
from convnext_jax.convert.hashing import named_hash
from convnext_jax.convert.hub import fetch_from_hub
from convnext_jax.convert.recognising import recognise
from convnext_jax.errors import UserError

_CHUNK = 2**20
_TIMEOUT_SECONDS = 60

_log = logging.getLogger("convnext_jax")


def cache_directory() -> Path:
    """Where downloads are kept: $CONVNEXT_JAX_CACHE, else the user's cache directory."""
    if own := os.environ.get("CONVNEXT_JAX_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "convnext_jax"


def fetch(source: str | Path, *, sha256: str | None = None, cache_dir: Path | None = None) -> Path:
    """Brings a source onto this machine, if it is not there yet.

    Args:
      source: a path, which is returned as it is; `https://…`, `http://…` or `file://…`, which is
        downloaded once; or `hf://owner/name[@revision][/file]`, which needs huggingface_hub.
      sha256: what the downloaded file must hash to, in hexadecimal; checked before it is kept.
      cache_dir: where downloads are kept; `cache_directory()` by default, and for the hub its own.

    Returns:
      The path of a file or, where the source is one, of a directory.

    Raises:
      UserError: if it cannot be had, was cut off, or has another hash; nothing is kept then.
    """
    text = str(source)
    scheme, separator, _ = text.partition("://")
    if isinstance(source, Path) or not separator:
        return Path(text).expanduser()
    if scheme == "file":
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(text).path))
    if scheme in ("http", "https"):
        return _download(text, sha256, cache_dir or cache_directory())
    if scheme == "hf":
        return fetch_from_hub(text, cache_dir / "hub" if cache_dir else None)
    raise UserError(
        f"{text} is neither a path nor of a kind that is fetched: https://…, http://…, file://… or "
        "hf://owner/name"
    )


def _download(url: str, sha256: str | None, cache_dir: Path) -> Path:
    address = urllib.parse.urlsplit(url)
    shown = address._replace(netloc=address.netloc.rpartition("@")[2], query="").geturl()
    name = re.sub(r"[^\w.-]", "_", urllib.parse.unquote(Path(address.path).name), flags=re.ASCII)
    # A directory a URL keeps the name, which may hold a hash and which messages show.
    directory = cache_dir / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = directory / (name.lstrip(".")[-120:] or "weights")
    if path.is_file():
        return path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".part-", dir=directory)
    except OSError as error:
        raise UserError(
            f"the cache {directory} cannot be written ({error.strerror}); set CONVNEXT_JAX_CACHE "
            "to a directory that can"
        ) from error
    part = Path(temporary)
    try:
        with os.fdopen(descriptor, "wb") as file:
            actual = _transfer(url, shown, file)
        expected = sha256.lower() if sha256 else named_hash(path.name)
        if expected and not actual.startswith(expected):
            raise UserError(
                f"{shown} has the SHA-256 {actual}, not {expected}; it was changed or damaged on "
                "its way, so it was not kept"
            )
        try:
            recognise(part)
        except FormatError as error:
            raise UserError(f"{shown} {error}") from error
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _transfer(url: str, shown: str, file: IO[bytes]) -> str:
    """Writes what a URL gives to a file and returns its SHA-256."""
    digest = hashlib.sha256()
    request = urllib.request.Request(url, headers={"User-Agent": "convnext_jax"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            if url.startswith("https:") and not response.url.startswith("https:"):
                raise UserError(f"{shown} leads to an address without encryption; give that itself")
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
            progress = _Progress(shown, total)
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                progress.advance(len(chunk))
            progress.close()
    except urllib.error.HTTPError as error:
        with error:
            raise UserError(
                f"{shown} answers {error.code} {error.reason}; check the address"
            ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(
            f"{shown} cannot be downloaded: {reason}; check the connection and try again"
        ) from error
    if total is not None and progress.done != total:
        raise UserError(
            f"{shown} was cut off after {progress.done:,} of {total:,} bytes; try again"
        )
    return digest.hexdigest()


class _Progress:
    """One line: rewritten on a terminal, logged at the beginning and the end elsewhere."""

    def __init__(self, what: str, total: int | None):
        self.done = 0
        self._what = what
        self._total = total
        self._begin = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()
        if not self._terminal:
            _log.info("downloading %s (%s)", what, self._of(total))

    @staticmethod
    def _of(size: int | None) -> str:
        return "size unknown" if size is None else f"{size / 1e6:,.1f} MB"

    def advance(self, size: int) -> None:
        self.done += size
        now = time.monotonic()
        if self._terminal and now - self._shown > 0.2:
            self._shown = now
            rate = self.done / 1e6 / (now - self._begin)
            print(
                f"\r{self._what}: {self.done / 1e6:,.1f} of {self._of(self._total)}, "
                f"{rate:,.1f} MB/s ",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        seconds = time.monotonic() - self._begin
        if self._terminal:
            print(file=sys.stderr)
        _log.info("downloaded %.1f MB in %.1f s", self.done / 1e6, seconds)
