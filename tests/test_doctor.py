"""Every check is made to fail, and the table must say it without hiding the others."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from runs import CONFIG_FILE, digit_folder, tiny

from convnext_jax import cli, doctor, experiment
from convnext_jax.data.digits import prepare
from convnext_jax.data.loader import train_loader
from convnext_jax.data.transforms import TrainTransform
from convnext_jax.errors import UserError
from convnext_jax.preflight import (
    collective,
    consensus,
    decoding,
    description,
    memory,
    plan_file,
    storage,
    versions,
)
from convnext_jax.preflight.examination import Check, Examination, Finding, Missing, Status
from convnext_jax.preflight.report import Report
from convnext_jax.preflight.table import named, render, rows
from convnext_jax.training.sharding import create_mesh
from convnext_jax.training.workdir import check_config

LINES = """
versions, devices, config, mesh, batch sizes, training set, evaluation set, durations, augmentation,
model, state, plan, workdir, run there, free space, open files, host memory, shared memory,
write speed, decoding, all-reduce, initial weights
"""
LINES = " ".join(LINES.split()).split(", ")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    prepare(directory)
    return directory


@pytest.fixture
def examine(digits, tmp_path, monkeypatch, capsys):
    """Runs the program on the tiny config; the exit status, and a line's sign and text by name."""
    monkeypatch.setenv("CONVNEXT_JAX_DATA_DIR", str(digits))
    monkeypatch.setattr(doctor, "DECODE_SECONDS", 0.05)
    monkeypatch.setattr(collective, "_LENGTH", 2**10)
    monkeypatch.setattr(collective, "_REPEATS", 1)
    monkeypatch.setattr(storage, "_SAMPLE_BYTES", 2**20)

    def run(*arguments: str) -> tuple[int, dict[str, tuple[str, str]]]:
        common = ["--config", str(CONFIG_FILE), "--workdir", str(tmp_path / "run")]
        status = cli.run(doctor.main, [*common, *arguments])
        return status, parse(capsys.readouterr().out)

    return run


def parse(printed: str) -> dict[str, tuple[str, str]]:
    lines: dict[str, tuple[str, str]] = {}
    name = ""
    for line in printed.splitlines():
        if line[0] != " ":
            sign, rest = line[0], line[2:]
            name, text = (part.strip() for part in rest.split("  ", 1))
            lines[name] = (sign, text)
        else:
            lines[name] = (lines[name][0], f"{lines[name][1]} {line.strip()}")
    return lines


def test_a_machine_that_is_well(examine, tmp_path):
    status, lines = examine()
    assert status == 0
    assert list(lines) == LINES
    assert {sign for sign, _ in lines.values()} == {"✓"}
    assert f"jax {jax.__version__}" in lines["versions"][1]
    assert lines["devices"][1] == "8 × cpu, on one process"
    assert lines["training set"][1].startswith("1,438 images of 10 classes")
    assert lines["evaluation set"][1].startswith("359 images of 10 classes")
    assert "40 steps, 44 an epoch" in lines["durations"][1]
    assert "over 8 devices is exact" in lines["all-reduce"][1]
    # Nothing is left, not even the workdir.
    assert list(tmp_path.iterdir()) == []


MISTAKES = [
    ("config", "--config=nowhere.py", "there is no config file nowhere.py"),
    ("config", "--config.init_from=", "--config.init_from=WEIGHTS"),
    ("config", "--config.optim.warm=1", "config.optim.warm is not a field"),
    ("mesh", "--config.mesh.fsdp=3", "3 = 6 devices, but there are 8"),
    ("batch sizes", "--config.eval_batch_size=36", "config.eval_batch_size = 36 can't be"),
    ("batch sizes", "--config.data.repeats=3", "config.data.repeats = 3 does not divide the 32"),
    ("training set", "--config.data.name=cifar10", "`tfds build cifar10"),
    ("evaluation set", "--config.data.eval_split=test", "has no split 'test'"),
    ("durations", "--config.optim.warmup=50 steps", "the warm-up must be the shorter"),
    ("augmentation", "--config.augment.policy=rand-x9", "rand-x9"),
    ("model", "--config.model.name=convnext_huge", "config.model: "),
    ("plan", "--plan=nowhere.json", "there is no plan nowhere.json"),
    ("plan", f"--plan={__file__}", "is no plan"),
    ("workdir", f"--workdir={__file__}", "is a file; give a directory"),
    ("workdir", "--workdir=gs://bucket/run", "is a URL; mount the bucket (gcsfuse)"),
    ("workdir", f"--workdir={__file__}/run", "can't be written"),
    ("workdir", "--workdir=/proc/run", "can't be written"),
    ("initial weights", "--config.init_from=nowhere", "config.init_from: "),
]


@pytest.mark.parametrize(("line", "argument", "sentence"), MISTAKES)
def test_a_mistake_is_one_line_and_hides_no_other(line, argument, sentence, examine, tmp_path):
    status, lines = examine(
        f"--config.data.data_dir={tmp_path / 'd'}" if "cifar" in argument else "--config.seed=0",
        argument,
    )
    assert status == 1
    assert list(lines) == LINES
    failed = [name for name, (sign, _) in lines.items() if sign == "✗"]
    assert failed == [line], lines
    assert sentence in lines[line][1]
    left_out = {text for sign, text in lines.values() if sign == "–"}
    assert left_out <= {f"not looked at, since {name!r} failed" for name in (line, "state")}
    assert lines["all-reduce"][0] == "✓"


def test_damaged_records_are_found(examine, digits, tmp_path):
    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    (shard,) = copy.rglob("*validation*array_record*")
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.seek(size // 4)
        file.write(bytes(size // 2))
    status, lines = examine(f"--config.data.data_dir={copy}")
    assert status == 1
    assert "can't be read" in lines["evaluation set"][1]
    assert "copy the split 'validation' to this host again" in lines["evaluation set"][1]
    assert lines["training set"][0] == lines["decoding"][0] == "✓"


def test_images_that_do_not_decode(examine, tmp_path):
    folder = digit_folder(tmp_path / "images", 2)
    (folder / "0" / "0000.png").write_bytes(b"no image")
    own = [
        "--config.data.name=folder",
        f"--config.data.data_dir={folder}",
        "--config.augment.crop=pad",
        "--config.batch_size=16",
    ]
    status, lines = examine(*own, "--config.data.eval_split=", "--config.total=20 steps")
    sign, text = lines["training set"]
    assert sign == "!"
    assert f"1 of 17 images can't be decoded: {folder}/0/0000.png" in text
    assert lines["evaluation set"][1] == "none: config.data.eval_split is empty"
    assert status == 0

    # A run that stops at such an image would stop.
    status, lines = examine(
        *own,
        "--config.data.eval_split=",
        "--config.total=20 steps",
        "--config.data.on_bad_image=stop",
    )
    assert status == 1
    assert "Cannot decode" in lines["decoding"][1]


def small_shared_memory(monkeypatch, free):
    real = os.statvfs

    def statvfs(path):
        if str(path) == "/dev/shm":
            return SimpleNamespace(f_bavail=free, f_frsize=1)
        return real(path)

    monkeypatch.setattr(os, "statvfs", statvfs)


def test_too_little_shared_memory(examine, monkeypatch):
    # 232 images of 8 × 8 pixels, four batches for each worker.
    needed = 232 * 8 * 8 * 3 * 4
    monkeypatch.setattr(decoding, "pace", lambda *_: Finding("left out", 1.0))
    for free, status in ((needed - 1, 1), (needed, 0)):
        small_shared_memory(monkeypatch, free)
        found, lines = examine("--config.data.workers=1")
        assert found == status, lines
        assert ("but up to" in lines["shared memory"][1]) == bool(status)
        assert ("--shm-size" in lines["shared memory"][1]) == bool(status)


def test_decoding_by_worker_processes(digits):
    config = tiny(data__workers=1, data__data_dir=str(digits))
    found = decoding.pace(config, experiment.open_train_source(config), None, 0.05)
    assert "images/s by one worker process" in found.detail
    assert found.value == found.measure > 0


def test_shared_memory_is_counted_as_the_loader_counts_it(monkeypatch):
    state = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(create_mesh(), P()))
    config = tiny(batch_size=64, data__image_size=256, data__workers=2)
    mine = memory.need(config, False, state)
    assert mine.shared == 96 * 2**20
    assert mine.state == 4
    small_shared_memory(monkeypatch, 0)
    source = [None] * 64
    with pytest.raises(UserError, match="need up to 96 MiB"):
        train_loader(
            source,
            TrainTransform(256),
            batch_size=64,
            seed=0,
            start_step=0,
            num_steps=1,
            num_workers=2,
        )


def test_too_little_memory(examine, monkeypatch, tmp_path):
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(decoding, "pace", lambda *_: Finding("left out", 1.0))
    meminfo.write_text("MemTotal: 99999999 kB\nMemAvailable: 1024 kB\n")
    status, lines = examine("--config.data.workers=1")
    sign, text = lines["host memory"]
    assert (status, sign) == (1, "✗")
    assert text.startswith("1 MiB available (the machine's), but about 40")
    assert "worker processes 400 MiB" in text
    assert "set fewer config.data.workers" in text

    meminfo.write_text(f"MemTotal: 99999999 kB\nMemAvailable: {450 * 1024} kB\n")
    status, lines = examine("--config.data.workers=1")
    assert (status, lines["host memory"][0]) == (0, "!")


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_may_have_less_than_its_machine(version, monkeypatch, tmp_path):
    own, root, meminfo = tmp_path / "own", tmp_path / "cgroup", tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 99999999 kB\nMemAvailable: {64 * 2**20} kB\n")
    for name, path in (("OWN_CGROUP", own), ("CGROUPS", root), ("MEMINFO", meminfo)):
        monkeypatch.setattr(memory, name, path)
    assert memory.available() == (64 * 2**30, "the machine's")

    job, limit, use, cache = (
        (
            root / "memory" / "job",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        )
        if version == 1
        else (root / "job", "memory.max", "memory.current", "inactive_file")
    )
    (job / "step").mkdir(parents=True)
    own.write_text("9:cpu:/other\n4:memory:/job/step\n" if version == 1 else "0::/job/step\n")
    unlimited = "9223372036854771712" if version == 1 else "max"
    (job / "step" / limit).write_text(f"{unlimited}\n")
    assert memory.available() == (64 * 2**30, "the machine's")
    # The bound of the group around it counts; what the kernel would give back is free.
    (job / limit).write_text(f"{8 * 2**30}\n")
    (job / use).write_text(f"{7 * 2**30}\n")
    (job / "memory.stat").write_text(f"active_file 5\n{cache} {2 * 2**30}\n")
    assert memory.available() == (3 * 2**30, "its cgroup's, of 8.0 GiB")


def test_too_little_disk(examine, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    status, lines = examine()
    sign, text = lines["free space"]
    assert (status, sign) == (1, "✗")
    assert "5 checkpoints of" in text
    assert "lower config.checkpoints_kept" in text


def test_another_run_in_the_workdir(examine, tmp_path):
    status, lines = examine()
    assert (status, lines["run there"]) == (0, ("✓", "a new run"))
    workdir = tmp_path / "run"
    check_config(workdir, tiny(seed=1).to_dict(), allow=False)
    assert examine()[1]["run there"] == ("✓", "a new run")
    (workdir / "checkpoints" / "7").mkdir(parents=True)
    status, lines = examine()
    assert (status, lines["run there"][0]) == (1, "✗")
    assert "seed: 1 -> 0" in lines["run there"][1]
    check_config(workdir, tiny(log_every="3 steps").to_dict(), allow=True)
    status, lines = examine()
    assert (status, lines["run there"]) == (0, ("✓", "goes on at step 7"))


def test_free_space_is_held_to_exact_bytes(monkeypatch, tmp_path):
    leaf = jax.ShapeDtypeStruct((1000,), np.float32)
    config = tiny(checkpoints_kept=2)

    def status(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        return storage.free_space(tmp_path, config, leaf).status

    assert status(4 * 4000) is Status.OK
    assert status(4 * 4000 - 1) is Status.FAILED
    # What lies there already needs no more room.
    for step in ("100", "200"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    assert status(2 * 4000) is Status.OK
    assert status(2 * 4000 - 1) is Status.FAILED


def test_few_open_files_are_a_warning(examine, monkeypatch):
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (1024, 8192))
    status, lines = examine()
    assert (status, lines["open files"][0]) == (0, "!")
    assert "may open 1,024 files (at most 8,192) → say `ulimit -n 4096`" in lines["open files"][1]


def test_a_wrong_sum_is_found(examine, monkeypatch):
    real = jnp.sum
    monkeypatch.setattr(collective.jnp, "sum", lambda x, axis: real(x, axis=axis).at[3].add(1))
    status, lines = examine()
    assert status == 1
    assert "the sum over 8 devices is wrong on" in lines["all-reduce"][1]
    assert "in 1 of 1,024 places" in lines["all-reduce"][1]


def test_a_host_too_slow_for_its_chips(examine, tmp_path):
    path = tmp_path / "plan.json"
    for pace, status in ((1e-3, 0), (1e9, 1)):
        path.write_text(json.dumps([plan(images_per_second=pace)]))
        found, lines = examine("--plan", str(path))
        assert found == status
        assert lines["plan"][0] == "✓"
    assert "by the plan the devices take 8,000,000,000" in lines["decoding"][1]
    assert "wait 100% of the time" in lines["decoding"][1]
    assert "config.data.decoder='fast'" in lines["decoding"][1]


def plan(**fields):
    """The fields of a plan that are looked at; the whole has its own test."""
    known = {
        "model": "convnext_atto",
        "topology": "v5e:2x4",
        "chips": 8,
        "batch_size": 32,
        "image_size": 8,
        "accumulation_steps": 1,
        "images_per_second": 100.0,
    }
    return known | fields


def test_the_plan_must_be_that_of_the_run(tmp_path):
    path = tmp_path / "plan.json"

    def look(*plans):
        path.write_text(json.dumps(plans))
        return plan_file.images_per_second(path, tiny())

    assert look(plan()).value == 800
    assert look(plan(chips=4), plan(images_per_second=7.0)).value == 56
    found = look(plan(batch_size=64, chips=16))
    assert found.status is Status.WARNING
    assert "but config.batch_size is 32, there 64, the number of devices is 8, there 16" in (
        found.detail
    )
    with pytest.raises(UserError, match="holds 2 plans, 0 of them for 8 chips"):
        look(plan(chips=4), plan(chips=4))
    with pytest.raises(UserError, match="says that convnext_atto on v5e:2x4 does not fit"):
        look(plan(images_per_second=None))


def test_how_a_pace_is_judged():
    statuses = [decoding.judged(made, 1000, "").status for made in (1000, 999, 500, 499)]
    assert statuses == [Status.OK, Status.WARNING, Status.WARNING, Status.FAILED]
    assert "wait 25% of the time" in decoding.judged(750, 1000, "").detail
    assert decoding.judged(1, None, "").status is Status.OK


def test_bytes_of_a_sharded_tree():
    mesh = create_mesh(2, 4)
    tree = {
        "whole": jax.ShapeDtypeStruct((10,), np.float32, sharding=NamedSharding(mesh, P())),
        "cut": jax.ShapeDtypeStruct(
            (8, 6), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp", None))
        ),
    }
    assert description.whole_bytes(tree) == 40 + 96
    assert description.device_bytes(tree) == 40 + 24
    assert description.process_bytes(tree) == 40 + 96


def test_an_examination_goes_on():
    exam, never = Examination(), threading.Event()

    def wrong():
        raise KeyError("surprise")

    assert exam.check("wrong", wrong) == Missing("wrong")
    assert exam.check("hangs", never.wait, seconds=0.05) == Missing("hangs")
    after = exam.check("after", lambda value: Finding("", value), Missing("wrong"))
    assert exam.check("later", lambda: Finding("", 1), needs=[after]) == Missing("wrong")
    assert exam.check("well", lambda value: Finding("seen", value), 3) == 3
    never.set()
    assert exam.hanging == ["hangs"]
    assert [(c.name, c.status.value, c.detail) for c in exam.checks] == [
        ("wrong", "failed", "KeyError: 'surprise'"),
        ("hangs", "failed", "not done after 0.05 s"),
        ("after", "skipped", "not looked at, since 'wrong' failed"),
        ("later", "skipped", "not looked at, since 'wrong' failed"),
        ("well", "ok", "seen"),
    ]


def test_a_check_that_hangs_does_not_keep_the_program(examine, monkeypatch):
    never, ended = threading.Event(), []
    monkeypatch.setattr(decoding, "pace", lambda *_: never.wait())
    monkeypatch.setattr(doctor, "DECODE_START_SECONDS", 0.0)
    # Comes back in this test, so that the exception after it is seen too.
    monkeypatch.setattr(os, "_exit", ended.append)
    status, lines = examine()
    never.set()
    assert ended == [status] == [1]
    assert "not done after" in lines["decoding"][1]
    assert lines["all-reduce"][0] == "✓"


def test_json_tells_all_and_overwrites_nothing(examine, tmp_path, capsys):
    path = tmp_path / "report.json"
    status, lines = examine("--json", str(path), "--config.mesh.fsdp=3")
    assert status == 1
    report = json.loads(path.read_text())
    assert report["failed"] == ["mesh"]
    assert [row["name"] for row in report["table"]] == list(lines)
    (process,) = report["processes"]
    assert process["host"] == socket.gethostname()
    assert process["facts"]["versions"]["jax"] == jax.__version__
    assert {check["name"] for check in process["checks"]} == set(LINES) - {"versions"}

    for argument, sentence in ((path, "give another --json"), (tmp_path / "a/b", "no such dir")):
        arguments = ["--config=c.py", "--workdir=w", "--json", str(argument)]
        assert cli.run(doctor.main, arguments) == 2
        assert sentence in capsys.readouterr().err


def report(host="a", checks=(), **facts):
    known = {
        "versions": versions.versions(),
        "devices": {"kind": "v5e", "local": 4},
        "config": tiny().to_dict(),
        "data": {"training set": {"name": "digits", "fingerprint": "1234"}},
        "state": True,
        "token": "t",
        "clock": 0.0,
    }
    return Report.from_json(Report(host, list(checks), known | facts).to_json())


def compared(*reports):
    return {check.name: check for check in consensus.compare(reports)}


def test_alike_processes_may_compute_together():
    reports = [report("a"), report("b")]
    assert {check.status for check in consensus.compare(reports)} == {Status.OK}
    decision = consensus.decide(reports)
    assert decision["hosts"] == ["a", "b"]
    assert decision["token"] == "t"
    assert decision["all-reduce"] == decision["initial weights"] == ""


@pytest.mark.parametrize("fact", ["versions", "devices"])
def test_processes_that_differ_are_named_and_do_not_compute(fact):
    other = {**report().facts[fact], ("jax" if fact == "versions" else "kind"): "other"}
    reports = [report("a"), report("b", **{fact: other}), report("c")]
    found = compared(*reports)["versions" if fact == "versions" else "same devices"]
    assert found.status is Status.FAILED
    assert "is other on process 1 (b), else " in found.detail
    assert found.remedy
    assert "not alike" in consensus.decide(reports)["all-reduce"]


def test_a_process_without_devices_or_word_keeps_the_others_from_computing():
    why = consensus.decide([report("a"), report("b", devices=None)])["all-reduce"]
    assert why == "not tried, since 'devices' failed"
    late = [report("a"), None, None]
    assert "since processes 1-2 (unknown host) has not" in consensus.decide(late)["all-reduce"]
    (check,) = consensus.late(late)
    assert check.status is Status.FAILED
    weights = consensus.decide([report("a"), report("b", state=False)])
    assert weights["all-reduce"] == ""
    assert "'state' failed" in weights["initial weights"]


def test_configs_and_data_sets_are_compared():
    other = tiny(seed=5, optim__b1=0.8).to_dict()
    found = compared(report("a"), report("b", config=other), report("c", config=None))
    assert found["same config"].status is Status.FAILED
    assert "seed is 5 on process 1 (b), else 0" in found["same config"].detail
    assert "optim.b1 is 0.8 on process 1 (b), else 0.9" in found["same config"].detail
    # What only decides how fast a host is may differ, and is said.
    found = compared(report("a"), report("b", config=tiny(data__workers=7).to_dict()))
    assert found["same config"].status is Status.WARNING
    data = {"training set": {"name": "digits", "fingerprint": "9999"}}
    found = compared(report("a", data=data), report("b"), report("c"))
    assert found["same data set"].status is Status.FAILED
    assert "fingerprint is 9999 on process 0 (a), else 1234" in found["same data set"].detail


def test_clocks():
    (check,) = consensus.clocks([report("a"), report("b", clock=-0.5)])
    assert (check.status, check.detail) == (Status.OK, "within 0.50 s of that of process 0")
    (check,) = consensus.clocks([report("a"), report("b", clock=-9.0), report("c", clock=1.0)])
    assert check.status is Status.WARNING
    assert check.detail == "up to 9.0 s from that of process 0 on process 1 (b)"


def test_the_table_shows_the_worst():
    hosts = list("abcdef")
    pace = [Check("pace", Status.OK, f"{n} images/s", measure=n) for n in (5, 3, 9, 8, 7, 6)]
    (row,) = rows([[check] for check in pace], hosts)
    assert row.texts == (("worst on process 1 (b): 3 images/s", ""),)

    full = [Check("disk", Status.FAILED, f"{n} free", "tidy up", measure=n) for n in range(5)]
    (row,) = rows([[check] for check in [Check("disk", Status.OK, "9 free"), *full[::-1]]], hosts)
    assert row.status is Status.FAILED
    assert row.texts[0] == ("process 5 (f): 0 free", "tidy up")
    assert row.texts[3:] == (("and 2 processes more; --json tells of each", ""),)

    same = Check("data", Status.FAILED, "absent", "copy it")
    (row,) = rows([[same]] * 6, hosts)
    assert render([row]) == "✗ data  absent\n        → copy it"
    assert named([0, 1, 2, 5], hosts) == "processes 0-2, 5 (a, b, c, f)"
    long = Check("long", Status.OK, "word " * 50)
    assert max(map(len, render(rows([[long]], ["a"])).splitlines())) <= 100


PROCESS = """
    import sys
    from convnext_jax import cli, doctor, experiment
    from convnext_jax.preflight import versions

    if __name__ == "__main__":
        if "OTHER" in sys.argv:
            sys.argv.remove("OTHER")
            real = versions.versions
            versions.versions = lambda: {**real(), "jaxlib": "0.0.1"}
        sys.exit(cli.run(doctor.main))
"""


def run_two(tmp_path, digits, *arguments, second=()):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "process.py"
    script.write_text(textwrap.dedent(PROCESS))
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "CONVNEXT_JAX_DATA_DIR": str(digits),
    }
    place = ["--coordinator", f"localhost:{port}", "--num_processes=2", "--config", CONFIG_FILE]
    processes = [
        subprocess.Popen(
            [sys.executable, script, *place, f"--process_id={index}", *arguments, *own],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index, own in enumerate(((), second))
    ]
    try:
        printed = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    # Of the collectives' own lines each process prints some, from several threads.
    gloo = re.compile(r"\[Gloo\]|.*connected peer ranks|\s*$")  # its lines may tear each other
    out = ["\n".join(x for x in out.splitlines() if not gloo.match(x)) for out, _ in printed]
    assert out[1] == ""
    return [process.returncode for process in processes], parse(out[0]), printed[1][1]


@pytest.mark.slow
def test_two_processes_that_are_well(tmp_path, digits):
    shared = tmp_path / "shared"
    statuses, lines, _ = run_two(tmp_path, digits, "--workdir", shared)
    assert statuses == [0, 0], lines
    assert {sign for sign, _ in lines.values()} == {"✓"}
    assert lines["devices"][1] == "4 × cpu, 2 on each of 2 processes"
    assert "one and the same directory" in lines["one workdir"][1]
    assert "over 4 devices is exact" in lines["all-reduce"][1]
    assert "for each of 2 processes" in lines["host memory"][1]
    assert not shared.exists()


@pytest.mark.slow
def test_two_processes_that_differ(tmp_path, digits):
    statuses, lines, printed = run_two(
        tmp_path,
        digits,
        "--workdir",
        tmp_path / "one",
        second=("OTHER", "--workdir", tmp_path / "two", "--config.data.name=nothing"),
    )
    assert statuses == [1, 1]
    failed = ["versions", "same config", "training set", "one workdir"]
    assert [name for name, (sign, _) in lines.items() if sign == "✗"] == failed
    where = f"process 1 ({socket.gethostname()})"
    assert f"jaxlib is 0.0.1 on {where}" in lines["versions"][1]
    assert f"data.name is nothing on {where}, else digits" in lines["same config"][1]
    assert f"{where}: There is no data set 'nothing'" in lines["training set"][1]
    assert f"{where}: --workdir {tmp_path / 'two'} is not" in lines["one workdir"][1]
    # Where jaxlib differs, a collective might hang.
    assert lines["all-reduce"] == ("–", "not tried, since the processes are not alike")
    assert lines["decoding"][0] == "–"
    assert "not ready to train: versions, same config, training set, one workdir" in printed
