"""A hub name, `hf://owner/name[@revision][/file]`, brought onto this machine by huggingface_hub.

The library keeps its own cache and is an optional extra, imported only when such a name is given.
"""

import re
import urllib.parse
from pathlib import Path

from convnext_jax.convert.locating import CONFIG_NAMES, USUAL_NAMES, read_weight_map
from convnext_jax.errors import UserError

_NAME = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.%-]+))?(?:/(?P<file>\S+))?"
)


def fetch_from_hub(source: str, cache_dir: Path | None = None) -> Path:
    """Brings a weights file, its shards and the configs beside it into the hub's cache.

    Args:
      source: `hf://owner/name`, with `@revision` (a "/" in it as "%2F") and the file's path behind
        it where they are not the usual.
      cache_dir: the hub library's own by default.

    Returns:
      The path of the weights file or, where they are sharded, of its index; the others are beside
      it.

    Raises:
      UserError: if huggingface_hub is missing, the hub has no such thing or cannot be reached.
    """
    match = _NAME.fullmatch(source)
    if match is None:
        raise UserError(
            f"{source} is no hub name; write hf://owner/name, hf://owner/name@revision or "
            "hf://owner/name/file"
        )
    revision = urllib.parse.unquote(match["revision"]) if match["revision"] else None
    repository = _Repository(source, match["repository"], revision, cache_dir)
    names = (match["file"],) if match["file"] else USUAL_NAMES
    path = next((path for name in names if (path := repository.get(name)) is not None), None)
    if path is None and repository.unreachable:
        raise UserError(
            f"{source}: the hub cannot be reached and its cache does not hold this; check the "
            "connection and try again"
        )
    if path is None:
        raise UserError(
            f"{source} has none of {', '.join(names)}; name the file, as in hf://owner/name/file"
        )
    folder = match["file"][: match["file"].rfind("/") + 1] if match["file"] else ""
    if path.name.endswith(".index.json"):
        for shard in sorted(set(read_weight_map(path).values())):
            if repository.get(folder + shard) is None:
                raise UserError(f"{source}: {path.name} lists {shard}, which cannot be had")
    for name in CONFIG_NAMES:
        repository.get(folder + name)
    return path


class _Repository:
    """One repository at one revision.

    Attributes:
      unreachable: whether the hub failed to answer; from then on only its cache is asked.
    """

    def __init__(self, source: str, repository: str, revision: str | None, cache_dir: Path | None):
        try:
            from huggingface_hub import errors, hf_hub_download
        except ImportError as error:
            raise UserError(
                "a name that begins with hf:// needs the hub library; "
                "pip install 'convnext-jax[hub]' (or huggingface_hub), or give the URL of the file"
            ) from error
        self._errors = errors
        self._download = hf_hub_download
        self._source = source
        self._repository = repository
        self._revision = revision
        self._cache_dir = cache_dir
        self.unreachable = False

    def get(self, name: str) -> Path | None:
        """The path of a file on this machine, None where the repository has no such file."""
        source, errors = self._source, self._errors
        try:
            path = self._download(
                self._repository,
                name,
                revision=self._revision,
                cache_dir=self._cache_dir,
                local_files_only=self.unreachable,
            )
        except errors.LocalEntryNotFoundError:
            # It has tried for half a minute, which no further name needs to repeat.
            self.unreachable = True
            return None
        except errors.EntryNotFoundError:
            return None
        except errors.GatedRepoError as error:
            raise UserError(
                f"{source} asks for its terms to be accepted; do so on its page at "
                "huggingface.co and log in with `hf auth login`"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise UserError(
                f"{source}: the hub has no such repository, or it is private; check the name, or "
                "log in with `hf auth login`"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise UserError(f"{source}: the repository has no such revision") from error
        # What else may go wrong, from its HTTP client to a full disk, has no common class.
        except Exception as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{source} cannot be fetched from the hub: {first_line}") from error
        return Path(path)
