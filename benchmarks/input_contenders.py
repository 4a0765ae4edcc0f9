"""The pipelines that input_pipeline.py compares; each runs as a process of its own.

    python benchmarks/input_contenders.py NAME IMAGES CORES

It answers on standard output, a JSON object a line: first what versions it runs on, then, for each
line "SECONDS" on standard input, how many images it made in about that time, and how much
processor time this took it and its workers. All make batches of 64 images of 224 × 224 pixels from
the same files, in an order of their own, without an end.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path

BATCH, SIZE = 64, 224
SEED = 0


def library_versions(*names):
    from importlib import metadata

    return {name: metadata.version(name) for name in names}


def folder_source(images):
    from convnext_jax.data.folder import FolderSource

    files = [os.fsencode(path.name) for path in image_files(images)]
    return FolderSource("benchmark", Path(images), "train", ["all"], files, [0] * len(files))


def image_files(images):
    return sorted(p for p in Path(images).iterdir() if p.suffix.lower() in (".jpg", ".jpeg"))


def bare_loop(images, cores, decoder):
    """Read, decode, crop, resize and flip, one after another: what a loader can at best do."""
    import numpy as np

    from convnext_jax.data.transforms import TrainTransform

    source, transform = folder_source(images), TrainTransform(SIZE, decoder=decoder)
    rng = np.random.default_rng(SEED)
    versions = library_versions("pillow", *(("simplejpeg",) if decoder == "fast" else ()))

    def batches():
        while True:
            for index in rng.integers(len(source), size=BATCH):
                transform(source[index].image, rng)
            yield BATCH

    return batches(), versions


def our_loader(images, cores, decoder):
    """This project's loader; on one core one worker process."""
    from convnext_jax.data.loader import train_loader
    from convnext_jax.data.transforms import TrainTransform

    loader = train_loader(
        folder_source(images),
        TrainTransform(SIZE, decoder=decoder),
        batch_size=BATCH,
        seed=SEED,
        start_step=0,
        num_steps=10**7,
        num_workers=cores,
    )
    extra = ("simplejpeg", "cykooz.resizer") if decoder == "fast" else ()
    return (len(batch["label"]) for batch in loader), library_versions("pillow", "grain", *extra)


def timm_loader(images, cores, tensors):
    """PyTorch's DataLoader over timm's transforms.

    With `tensors` the host does all of the recipe, normalisation and erasing included. Without,
    it stops at uint8 after RandAugment and leaves these two to the device, as timm's own loader
    does where there is one.
    """
    import torch

    # torchvision registers its compiled operators' outlines at import; beside a PyTorch build that
    # they were not compiled for they are missing, and the import fails.
    library = torch.library.Library("torchvision", "DEF")
    try:
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
    except RuntimeError:  # they are there
        pass
    from PIL import Image, ImageOps
    from timm.data import auto_augment, create_transform

    def posterize(image, bits, **_):
        """Keeps `bits` bits; timm's own asks Pillow for 0 bits, which Pillow 13 refuses."""
        if bits >= 8:
            return image
        return ImageOps.posterize(image, bits) if bits > 0 else image.point(lambda _: 0)

    for name in ("Posterize", "PosterizeOriginal", "PosterizeIncreasing"):
        auto_augment.NAME_TO_OP[name] = posterize

    files = image_files(images)
    transform = create_transform(
        SIZE,
        is_training=True,
        interpolation="bicubic",
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.25,
        re_mode="pixel",
        use_prefetcher=not tensors,
    )

    class Files(torch.utils.data.Dataset):
        def __len__(self):
            return len(files) * 10_000

        def __getitem__(self, index):
            with Image.open(files[index % len(files)]) as image:
                return transform(image.convert("RGB")), 0

    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        Files(), batch_size=BATCH, shuffle=True, num_workers=cores, drop_last=True
    )
    versions = library_versions("timm", "torch", "pillow")
    return (len(labels) for _, labels in loader), versions


def tf_data(images, cores):
    """A plain tf.data pipeline: decode and crop in one, bicubic antialiased resizing, a flip."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(cores)

    def example(path):
        encoded = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(encoded),
            tf.zeros([1, 0, 4]),
            area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
        image = tf.image.resize(image, (SIZE, SIZE), "bicubic", antialias=True)
        image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
        return tf.image.random_flip_left_right(image)

    files = [str(path) for path in image_files(images)]
    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    dataset = dataset.map(example, num_parallel_calls=cores).batch(BATCH).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    dataset = dataset.with_options(options)
    # Not by its distribution's name, of which it has several.
    return (len(batch) for batch in dataset.as_numpy_iterator()), {"tensorflow": tf.__version__}


CONTENDERS = {
    "bare": lambda images, cores: bare_loop(images, cores, "pillow"),
    "loader": lambda images, cores: our_loader(images, cores, "pillow"),
    "bare-fast": lambda images, cores: bare_loop(images, cores, "fast"),
    "loader-fast": lambda images, cores: our_loader(images, cores, "fast"),
    "timm": lambda images, cores: timm_loader(images, cores, tensors=True),
    "timm-uint8": lambda images, cores: timm_loader(images, cores, tensors=False),
    "tf.data": tf_data,
}


def processor_seconds():
    """What this process and its workers, its process group, have used so far."""
    ticks, group = 0, str(os.getpgrp())
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:  # it has ended
                continue
            if fields[2] == group:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(batches, seconds):
    """Images and seconds, once what lay ready in queues has been used up."""
    end_of_queues = time.perf_counter() + seconds / 2
    while time.perf_counter() < end_of_queues:
        next(batches)
    begun, used, images = time.perf_counter(), processor_seconds(), 0
    for count in batches:
        images += count
        elapsed = time.perf_counter() - begun
        if elapsed >= seconds:
            used = processor_seconds() - used
            return {"images": images, "seconds": elapsed, "processor_seconds": used}
    raise AssertionError("the batches have no end")


def main():
    name, images, cores = sys.argv[1], sys.argv[2], int(sys.argv[3])
    batches, versions = CONTENDERS[name](images, cores)
    batches = iter(batches)
    for _ in itertools.islice(batches, 2 * cores):  # start what has to start
        pass
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(batches, float(line))), flush=True)
    os._exit(0)  # without waiting for anybody's workers


if __name__ == "__main__":
    main()
