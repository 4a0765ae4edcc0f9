import logging
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from convnext_jax.data import loader
from convnext_jax.data.loader import eval_loader, eval_steps, train_loader
from convnext_jax.data.sources import open_source
from convnext_jax.data.transforms import PadCropTrainTransform, ResizeEvalTransform, TrainTransform
from convnext_jax.errors import UserError

TRAIN = TrainTransform(8)


@pytest.fixture
def source(image_folder):
    """21 images in three classes."""
    return open_source("folder", "train", str(image_folder), validation_fraction=0.0)


def train(source, **options):
    options = {"batch_size": 4, "seed": 0, "start_step": 0, "num_steps": 12} | options
    iterator = train_loader(source, options.pop("transform", TRAIN), **options)
    batches = list(iterator)
    iterator.close()
    return batches


def evaluate(source, **options):
    iterator = eval_loader(source, ResizeEvalTransform(8), **({"batch_size": 4} | options))
    batches = list(iterator)
    iterator.close()
    return batches


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assembled(parts):
    """Global batches, from what each process made."""
    return [
        {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        for batches in zip(*parts, strict=True)
    ]


def test_batches_are_what_they_are_said_to_be(source):
    for batch in train(source, num_steps=3):
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
            "image": ((4, 8, 8, 3), "uint8"),
            "label": ((4,), "int32"),
            "index": ((4,), "int64"),
            "bad_index": ((4,), "int64"),
        }
        for row in range(4):
            index = batch["index"][row]
            # Each file has one colour, its index; a resized crop of it keeps that colour.
            assert (batch["image"][row] == index).all()
            assert batch["label"][row] == source[index].label
        assert (batch["bad_index"] == -1).all()


@pytest.mark.parametrize("start_step", [1, 5, 7, 12])
def test_a_batch_depends_on_its_step_alone(source, start_step):
    assert_equal(train(source, start_step=start_step), train(source)[start_step:])


def test_each_example_is_seen_at_most_once_an_epoch_and_the_remainder_changes(source):
    steps = 21 // 4
    batches = train(source, num_steps=steps * 8)
    left_out = set()
    orders = set()
    for epoch in range(8):
        seen = np.concatenate([b["index"] for b in batches[epoch * steps : (epoch + 1) * steps]])
        assert len(seen) == len(set(seen)) == 20
        left_out |= set(range(21)) - set(seen)
        orders.add(tuple(seen))
    assert len(left_out) > 1
    assert len(orders) == 8


def test_seeds_differ_in_order_and_in_augmentation(image_folder):
    source = open_source("folder", "train", str(image_folder), validation_fraction=0.0)
    orders = {tuple(np.concatenate([b["index"] for b in train(source, seed=s)])) for s in range(4)}
    assert len(orders) == 4
    # The seeds of neighbouring runs must not give each other's later epochs.
    first, second = train(source, seed=0, num_steps=10), train(source, seed=1, num_steps=5)
    assert not np.array_equal(
        np.concatenate([b["index"] for b in first[5:]]),
        np.concatenate([b["index"] for b in second]),
    )


def test_an_image_is_augmented_anew_each_epoch(source):
    transform = PadCropTrainTransform(8, padding=4)
    shown = {}
    for batch in train(source, transform=transform, num_steps=40):
        for index, image in zip(batch["index"], batch["image"], strict=True):
            shown.setdefault(int(index), set()).add(image.tobytes())
    # Index 0 is all black, so its padding does not show.
    assert min(len(variants) for index, variants in shown.items() if index) > 3


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_augmentation_shows_each_image_several_times_in_a_batch(source, repeats):
    options = {"batch_size": 6, "repeats": repeats, "transform": PadCropTrainTransform(8)}
    # 21 images, 6 / repeats a step: a pass takes 7 · repeats / 2 steps, rounded down.
    steps = 21 * repeats // 6
    batches = train(source, num_steps=2 * steps, **options)
    for begin in (0, steps):
        shown = []
        for batch in batches[begin : begin + steps]:
            images = batch["index"].reshape(-1, repeats)
            assert (images == images[:, :1]).all()
            assert len(set(images[:, 0])) == 6 // repeats
            shown += list(images[:, 0])
            np.testing.assert_array_equal(batch["label"], [source[i].label for i in batch["index"]])
        assert len(shown) == len(set(shown)) == steps * 6 // repeats
    views = np.concatenate([b["image"] for b in batches]).reshape(-1, repeats, 8, 8, 3)
    differing = sum((group[0] != group[1]).any() for group in views)
    assert differing > len(views) / 2
    assert_equal(train(source, start_step=5, num_steps=2 * steps, **options), batches[5:])
    if repeats == 3:  # of two processes each makes three rows
        part = {"num_steps": 2 * steps, "process_count": 2} | options
        halves = [train(source, process_index=p, **part) for p in range(2)]
        assert_equal(assembled(halves), batches)


def test_without_repeats_an_image_is_drawn_as_before(source):
    assert_equal(train(source, repeats=1), train(source))


def test_workers_are_counted_from_the_cores(monkeypatch):
    for cores, workers in (({5}, 1), (set(range(2)), 1), (set(range(8)), 7), (set(range(240)), 64)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores, raising=False)
        assert loader.default_workers() == workers


def test_too_little_shared_memory_is_told_before_it_kills(source, tmp_path, monkeypatch):
    free = os.statvfs_result((4096, 4096, 100, 50, 50, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    transform = PadCropTrainTransform(64)
    with pytest.raises(UserError, match=r"1 worker processes need up to 1 MiB.*--shm-size"):
        train(source, transform=transform, num_workers=1, batch_size=8)
    assert len(train(source, transform=transform, num_workers=0, batch_size=8, num_steps=1)) == 1


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(source, process_count):
    def part(p):
        return {"process_index": p, "process_count": process_count}

    whole = [train(source, start_step=3, **part(p)) for p in range(process_count)]
    assert_equal(assembled(whole), train(source, start_step=3))
    whole = [evaluate(source, **part(p)) for p in range(process_count)]
    assert len({len(batches) for batches in whole}) == 1
    assert_equal(assembled(whole), evaluate(source))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_batches_do_not_depend_on_the_number_of_workers(source, num_workers):
    transform = PadCropTrainTransform(8)
    assert_equal(
        train(source, transform=transform, start_step=2, num_steps=7, num_workers=num_workers),
        train(source, transform=transform, start_step=2, num_steps=7),
    )
    assert_equal(evaluate(source, num_workers=num_workers), evaluate(source))


@pytest.mark.parametrize("batch_size", [1, 4, 7, 32])
def test_evaluation_covers_every_example_once(source, batch_size):
    batches = evaluate(source, batch_size=batch_size)
    assert len(batches) == eval_steps(21, batch_size) == -(-21 // batch_size)
    joined = assembled([[b] for b in batches])[0]
    real = joined["mask"] == 1
    assert joined["mask"].dtype == np.float32
    np.testing.assert_array_equal(joined["index"][real], np.arange(21))
    np.testing.assert_array_equal(joined["label"][real], [source[i].label for i in range(21)])
    assert (joined["image"][real] == joined["index"][real, None, None, None]).all()
    for name, padding in (("image", 0), ("label", 0), ("index", -1), ("mask", 0)):
        assert (joined[name][~real] == padding).all()


@pytest.fixture
def damaged(source):
    """Records 5 and 6 (one after another), and the last, cannot be decoded."""
    for index, content in ((5, b"a text file\n"), (6, None), (20, b"")):
        path = source.describe(index)
        with open(path, "rb") as file:
            original = file.read()
        with open(path, "wb") as file:
            file.write(original[: len(original) // 2] if content is None else content)
    return source


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_replaced_and_named_once(damaged, caplog, num_workers):
    iterator = train_loader(
        damaged, TRAIN, batch_size=7, seed=0, start_step=0, num_steps=9, num_workers=num_workers
    )
    with caplog.at_level(logging.WARNING, logger="convnext_jax"):
        batches = list(iterator)
    replaced = {
        (int(bad), int(index))
        for batch in batches
        for bad, index in zip(batch["bad_index"], batch["index"], strict=True)
        if bad >= 0
    }
    assert replaced == {(5, 7), (6, 7), (20, 0)}
    for batch in batches:
        assert (batch["image"] == batch["index"][:, None, None, None]).all()
    assert iterator.bad_images == {5, 6, 20}
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 3
    for index in (5, 6, 20):
        assert sum(damaged.describe(index) in message for message in named) == 1
    assert "(3 such so far)" in named[-1]


def test_bad_images_are_masked_out_of_an_evaluation(damaged, caplog):
    iterator = eval_loader(damaged, ResizeEvalTransform(8), batch_size=8)
    with caplog.at_level(logging.WARNING, logger="convnext_jax"):
        joined = assembled([[b] for b in iterator])[0]
    assert joined["mask"].sum() == 18
    assert set(joined["index"][joined["mask"] == 0]) == {5, 6, 20, -1}
    assert iterator.bad_images == {5, 6, 20}
    for index, record in zip((5, 6, 20), caplog.records, strict=True):
        assert damaged.describe(index) in record.getMessage()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_stop_a_run_that_asks_for_it(damaged, num_workers):
    with pytest.raises(UserError, match=r"Cannot decode .*0[567]\.png.*set on_bad_image") as caught:
        train(damaged, on_bad_image="stop", num_workers=num_workers)
    assert not getattr(caught.value, "__notes__", [])
    with pytest.raises(UserError, match=r"Cannot decode .*05\.png"):
        evaluate(damaged, on_bad_image="stop")


def test_a_data_set_of_nothing_but_bad_images_is_an_error(source):
    for index in range(len(source)):
        with open(source.describe(index), "wb") as file:
            file.write(b"<html>404</html>")
    with pytest.raises(UserError, match="21 images in a row cannot be decoded"):
        train(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 22}, "21 examples, fewer than one batch of 22"),
        ({"batch_size": 6, "process_count": 4}, "multiple of the 4 processes"),
        ({"process_index": 2, "process_count": 2}, "process_index 2"),
        ({"start_step": 13}, "start_step 13"),
        ({"seed": -1}, "seed"),
        ({"repeats": 3}, "repeats must divide the 4 images"),
        ({"repeats": 0}, "repeats must divide"),
        ({"repeats": 2, "process_count": 4}, "repeats must divide the 1 images"),
        ({"on_bad_image": "ignore"}, "'skip' or 'stop', not 'ignore'"),
        ({"num_workers": -1}, "num_workers"),
    ],
)
def test_wrong_arguments_are_the_users_mistakes(source, options, message):
    with pytest.raises(UserError, match=message):
        train(source, **options)


WORKER_PROGRAM = """
import multiprocessing, sys, time
from convnext_jax.data.loader import train_loader
from convnext_jax.data.sources import open_source
from convnext_jax.data.transforms import TrainTransform

if __name__ == "__main__":
    source = open_source("folder", "train", sys.argv[1], validation_fraction=0.0)
    batches = train_loader(source, TrainTransform(8), batch_size=4, seed=0, start_step=0,
                           num_steps=10**6, num_workers=2)
    for _ in range(4):
        next(batches)
    print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    if sys.argv[2] == "kill":
        time.sleep(600)
    if sys.argv[2] == "close":
        batches.close()
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie that init has yet to reap has ended as well.
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", ["kill", "close", "exit"])
def test_workers_end_with_their_parent(image_folder, tmp_path, end):
    program = tmp_path / "program.py"
    program.write_text(WORKER_PROGRAM)
    with subprocess.Popen(
        [sys.executable, str(program), str(image_folder), end],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        if end == "kill":
            process.kill()
        else:
            assert process.wait(timeout=60) == 0
            # Python's own tracker may still say that it removed shared memory in flight.
            assert "Traceback" not in process.stderr.read()
        deadline = time.monotonic() + 30
        while any(alive(pid) for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.1)
