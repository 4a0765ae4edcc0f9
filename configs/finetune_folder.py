"""Your own photographs, sorted into one folder a class: a trained ConvNeXt fine-tuned on them.

    python -m convnext_jax.train --config configs/finetune_folder.py --workdir runs/photos \
        --config.data.data_dir=PHOTOS --config.init_from=RUN

PHOTOS holds train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg alone, of which a seeded tenth is
held out. RUN is the workdir, or the directory of checkpoints, of a run of this library; its
classifier is replaced by a new one for the classes found. The model must be that of RUN:
ConvNeXt-T, or another by its name after a colon,

    python -m convnext_jax.train --config configs/finetune_folder.py:convnext_base \
        --workdir runs/photos_base --config.data.data_dir=PHOTOS --config.init_from=RUN

Meant for one GPU or one TPU chip (64 images a step); on a CPU add --config.model.dtype=float32 and
have patience. Expected top-1: it depends on the photographs, on how many they are and how near to
what RUN has seen; there is no figure to hold it to. With fewer than 64 training images lower
config.batch_size; where accuracy still rises at the end, give a longer config.total.
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config(model: str = "convnext_tiny") -> ConfigDict:
    """Paper, table 6, for small sets; `model`, a name of the registry, follows the colon."""
    config = recipes.finetune(model, image_size=224, drop_path_rate=0.1, layer_decay=0.8)
    config.data.name = "folder"
    config.data.workers = 4
    # The paper's learning rate, 5e-5 for 512 images, is kept at 64: scaled down with the batch, the
    # few hundred steps of a small set would hardly move the new classifier away from its start.
    config.batch_size = 64
    config.eval_batch_size = 64

    config.log_every = "20 steps"
    config.checkpoints_kept = 1  # and the best one
    return config
