"""Builds a small stand-in for TFDS's imagenet2012 out of a folder of JPEGs.

The result is what `tfds build imagenet2012 --file_format=array_record` leaves on a pod's disk, but
for its size: same name, same feature spec, same 1,000 labels, ArrayRecord. TensorFlow isn't needed.

    python tests/data/make_imagenet_like.py --images=DIR --data_dir=DIR

The files are named `<wnid>_<anything>.JPEG`. Every fifth goes to validation, the rest to train.
"""

import argparse
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

Imagenet2012 = tfds.builder_cls("imagenet2012")

# Its name is taken in TFDS's registry, by the data set that it stands in for.
with registered.skip_registration():

    class ImagenetLike(Imagenet2012):
        """imagenet2012's builder, fed from a folder in place of the challenge's archives."""

        name = "imagenet2012"
        code_path = None  # nothing is downloaded, so there are no checksums to look for
        MANUAL_DOWNLOAD_INSTRUCTIONS = None
        images: tuple[Path, ...] = ()
        validation_every = 5

        def _split_generators(self, dl_manager):
            held_out = self.images[:: self.validation_every]
            train = [image for image in self.images if image not in set(held_out)]
            return {"train": self._generate(train), "validation": self._generate(held_out)}

        def _generate(self, images):
            for image in images:
                yield (
                    image.name,
                    {"image": image, "label": image.name.split("_")[0], "file_name": image.name},
                )


def build(images: Path, data_dir: Path) -> Path:
    """Writes the data set below `data_dir` and returns its directory."""
    files = tuple(sorted(images.glob("*.JPEG")))
    if not files:
        raise SystemExit(f"There are no .JPEG files in {images}.")
    builder = ImagenetLike(data_dir=str(data_dir), file_format="array_record")
    builder.images = files
    builder.download_and_prepare()
    return Path(builder.data_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    arguments = parser.parse_args()
    print(build(arguments.images, arguments.data_dir))
