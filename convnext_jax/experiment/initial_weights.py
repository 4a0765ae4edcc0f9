"""The weights that a config says to start from."""

from ml_collections import ConfigDict

from convnext_jax.convert.stored import find_weights
from convnext_jax.errors import UserError
from convnext_jax.training.init_from import StoredWeights


def check_init_from(config: ConfigDict) -> None:
    """Holds a recipe that fine-tunes to weights that the user names.

    Raises:
      UserError: if there is none; it says how to name them.
    """
    if config.init_from == "":
        raise UserError(
            "this recipe fine-tunes: say from what by --config.init_from=WEIGHTS (a converted or "
            "foreign checkpoint, or the workdir of a run), or --config.init_from=None to start "
            "from random weights"
        )


def find_initial_weights(config: ConfigDict) -> StoredWeights | None:
    """What `config.init_from` names; None where that is None.

    Raises:
      UserError: if nothing is there, or nothing that can be read.
    """
    if config.init_from is None:
        return None
    try:
        return find_weights(config.init_from)
    except UserError as error:
        raise UserError(f"config.init_from: {error}") from error
