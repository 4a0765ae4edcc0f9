"""What the readers raise about a file's bytes, before the file's name is put in front."""


class FormatError(Exception):
    """A file that is damaged, hostile, or of a kind that is not read here.

    Its message continues a sentence that begins with the file's name: "is truncated: …". It never
    reaches the user as such; `reading` and `fetching` turn it into a `UserError`.
    """


def quote(text: object, limit: int = 80) -> str:
    """A name out of an untrusted file as it may be printed: escaped, and cut at `limit`."""
    if not isinstance(text, str):
        return f"an object of type {type(text).__name__}"
    return ascii(text[:limit]) + ("…" if len(text) > limit else "")
