"""How many images a host makes in a second: this loader, timm's recipe, tf.data, in one run.

    python benchmarks/input_pipeline.py --images DIR --peers DIR [--machine]

DIR of images holds JPEGs, such as a sample of ImageNet; without one, photographs that scikit-learn
ships are cut into JPEGs of ImageNet's usual size. The peers (PyTorch with timm, TensorFlow) are
installed below the other DIR, each into an environment of its own, and found there the next time;
without it only this project's rows are measured.

Everything is pinned to one core, worker processes included, with one thread for operators, and
images are counted by the second of processor time, so that other programs on the machine disturb
the figures little; those by the clock stand beside them. With --machine a second table follows, on
all cores and by the clock. The contenders take turns, and each figure is the median of the turns.

This project's rows decode, crop, resize and flip: the rest of the recipe runs
on the accelerator. The rows of timm hold the recipe as timm runs it: RandAugment on the host, and
normalisation and erasing on the host too, or (uint8) left to the device. timm's Posterize fails
with Pillow 13 where it keeps 0 bits; it is replaced by one that gives black.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

CONTENDERS = Path(__file__).with_name("input_contenders.py")
TORCH = ("torch==2.13.0", "torchvision", "timm")
TENSORFLOW = ("tensorflow",)

# Silences TensorFlow at its start, and Python on shared memory that its tracker removes at the end.
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "PYTHONWARNINGS": "ignore"}

# Name, what it is, and the packages of the environment that it needs (none: this one).
ROWS = (
    ("bare", "decode, crop, resize, flip in a loop", ()),
    ("loader", "this loader", ()),
    ("bare-fast", "the loop, decoder 'fast'", ()),
    ("loader-fast", "this loader, decoder 'fast'", ()),
    ("timm", "timm's recipe, DataLoader", TORCH),
    ("timm-uint8", "the same, uint8 leaves the host", TORCH),
    ("tf.data", "tf.data, decode-and-crop, bicubic", TENSORFLOW),
)


class Contender:
    """A pipeline in a process of its own, which makes images when it is told to."""

    def __init__(self, python, name, images, cores):
        command = [str(python), str(CONTENDERS), name, str(images), str(len(cores))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **QUIET},
            start_new_session=True,  # the group whose processor time counts
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        self.by_processor, self.by_clock = [], []
        self.versions = self._answer()

    def take_turn(self, seconds):
        """Measures once more."""
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.by_processor.append(answer["images"] / answer["processor_seconds"])
        self.by_clock.append(answer["images"] / answer["seconds"])

    def close(self):
        """Ends the process, and with it its workers."""
        self._process.stdin.close()
        self._process.wait()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self._process.args)} has failed; see above.")
        return json.loads(line)


def environment(peers, packages):
    """The Python of an environment with these packages, made if it is not there."""
    if not packages:
        return Path(sys.executable)
    home = peers / packages[0].split("=")[0]
    python = home / "bin" / "python"
    if not python.exists():
        print(f"installing {', '.join(packages)} into {home}", flush=True)
        venv.create(home, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def made_photographs(directory):
    """Writes 100 JPEGs of 500 × 375 pixels, cut from scikit-learn's photographs."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for i in range(100):
        photograph = photographs[i % len(photographs)]
        width = int(rng.integers(500, photograph.width + 1))
        height = width * 3 // 4
        height, width = min(height, photograph.height), min(width, photograph.width)
        left = int(rng.integers(photograph.width - width + 1))
        top = int(rng.integers(photograph.height - height + 1))
        part = photograph.crop((left, top, left + width, top + height)).resize((500, 375))
        part.save(directory / f"{i:03}.jpg", quality=95)
    return directory


def compare(rows, images, peers, cores, rounds, seconds):
    """Prints one table."""
    contenders = {}
    try:
        for name, _, packages in rows:
            python = environment(peers, packages)
            contenders[name] = Contender(python, name, images, cores)
        for _ in range(rounds):
            for contender in contenders.values():
                contender.take_turn(seconds)
    finally:
        for contender in contenders.values():
            contender.close()

    alone = len(cores) == 1
    rates = {name: c.by_processor if alone else c.by_clock for name, c in contenders.items()}
    medians = {name: statistics.median(r) for name, r in rates.items()}
    ratios = [peer for peer in ("timm", "timm-uint8", "tf.data") if peer in medians]
    unit = "images a second of one core" if alone else f"images a second, {len(cores)} cores"
    print(f"\n{unit:36} {'median':>7} {'range':>11} {'by clock':>9}", end="")
    print("".join(f"{'/ ' + peer:>13}" for peer in ratios))
    for name, title, _ in rows:
        low, high = min(rates[name]), max(rates[name])
        clock = statistics.median(contenders[name].by_clock)
        print(f"{title:36} {medians[name]:7.0f} {low:5.0f}–{high:<5.0f} {clock:9.0f}", end="")
        print("".join(f"{medians[name] / medians[peer]:13.2f}" for peer in ratios))
    for loader, bare in (("loader", "bare"), ("loader-fast", "bare-fast")):
        if alone and {loader, bare} <= medians.keys():
            overhead = medians[bare] / medians[loader] - 1
            print(f"{loader}: {overhead:.1%} more time an image than the bare loop")
    versions = {k: v for contender in contenders.values() for k, v in contender.versions.items()}
    print(", ".join(f"{package} {version}" for package, version in versions.items()))


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder of JPEGs")
    parser.add_argument("--peers", type=Path, help="where the peers' environments lie")
    parser.add_argument("--machine", action="store_true", help="measure on all cores, too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    parser.add_argument("--only", nargs="+", help=f"of {', '.join(name for name, *_ in ROWS)}")
    arguments = parser.parse_args()

    rows = [row for row in ROWS if arguments.peers or not row[2]]
    rows = [row for row in rows if not arguments.only or row[0] in arguments.only]
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        images = arguments.images or made_photographs(Path(scratch))
        files = [p for p in images.iterdir() if p.suffix.lower() in (".jpg", ".jpeg")]
        if not files:
            raise SystemExit(f"There are no JPEGs in {images}.")
        kilobytes = sum(p.stat().st_size for p in files) / len(files) / 1e3
        source = images if arguments.images else "photographs of scikit-learn"
        print(f"{len(files)} JPEGs of {kilobytes:.0f} kB in the mean, {source}")
        groups = [cores[-1:], cores] if arguments.machine else [cores[-1:]]
        for group in groups:
            settings = (arguments.peers, group, arguments.rounds, arguments.seconds)
            compare(rows, images, *settings)


if __name__ == "__main__":
    main()
