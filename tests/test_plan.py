"""Plans, of a compiler that is played by the tests; and, where libtpu is, of the true one."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from convnext_jax import cli, plan
from convnext_jax.analysis.tpu import OutOfHbmError, TpuTopology
from convnext_jax.analysis.tpu_chips import CHIPS
from convnext_jax.planning.planned_run import PlannedRun
from convnext_jax.planning.training_sets import KNOWN

CONFIG = str(Path(__file__).parent / "tiny_config.py")
GIB = 2**30

TEXT = """HloModule jit_train_step, is_scheduled=true

ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  %conv = f32[1024]{0} fusion(%x), metadata={op_name="jit(train_step)/jvp(ConvNeXt)/stages_0/\
blocks_0/dwconv/conv_general_dilated"}, backend_config={"estimated_cycles":"3000000"}
  %head = f32[1024]{0} fusion(%conv), metadata={op_name="jit(train_step)/transpose(jvp(ConvNeXt))/\
head/dot_general"}, backend_config={"estimated_cycles":"1000000"}
  %kernel = f32[4096]{0} custom-call(%head), custom_call_target="tpu_custom_call"
  ROOT %sum = f32[1000000]{0} all-reduce(%head), to_apply=%add
}
"""


class Compiler:
    """Stands for the TPU's: takes so much memory for each image, and refuses what is too much."""

    def __init__(self, per_image=GIB // 2, remat_saves=0.0, says_figures=True):
        self.per_image, self.remat_saves, self.says_figures = per_image, remat_saves, says_figures
        self.asked = []

    def compile(self, run, images_on_each, *, remat=False):
        self.asked.append((images_on_each, remat))
        memory = run.memory(images_on_each)
        temporaries = int(images_on_each * self.per_image * (1 - self.remat_saves * remat))
        arguments = memory.parameters + memory.optimizer + memory.average + memory.batch
        total, available = arguments + temporaries, run.topology.chip.usable_hbm_bytes
        if total > available:
            text = "RESOURCE_EXHAUSTED: Ran out of memory on HBM.\nThe largest: …"
            raise OutOfHbmError(total if self.says_figures else None, available, text)
        return SimpleNamespace(
            as_text=lambda: TEXT,
            memory_analysis=lambda: SimpleNamespace(
                argument_size_in_bytes=arguments + 500,
                output_size_in_bytes=arguments,
                alias_size_in_bytes=arguments - 20,
                temp_size_in_bytes=temporaries,
                generated_code_size_in_bytes=3000,
            ),
        )


@pytest.fixture
def compiler(monkeypatch):
    """A compiler, and topologies made of the CPU's devices."""
    found = Compiler()

    def topology(name):
        return TpuTopology(name, CHIPS[name.partition(":")[0]], (2, 2), tuple(jax.devices()[:4]))

    monkeypatch.setattr(plan, "tpu_topology", topology)
    monkeypatch.setattr(
        PlannedRun, "compile", lambda run, *args, **kw: found.compile(run, *args, **kw)
    )
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.2.3")
    return found


def planned(*arguments):
    """Runs the program."""
    return plan.main(["--config", CONFIG, *arguments])


def test_a_page(compiler, capsys):
    (made,) = planned("--topology", "v5e:2x2")
    assert compiler.asked == [(8, False)]
    assert made.fits
    assert made.step.computation == pytest.approx(4e6 / CHIPS["v5e"].clock)
    assert made.step.exchange == pytest.approx(2 * 4e6 / 200e9)
    rate = 8 / made.step.seconds
    assert made.images_per_second == pytest.approx(rate)
    assert made.mfu == pytest.approx(rate * 6 * made.macs / 197e12)
    assert made.hours == pytest.approx(40 * made.step.seconds / 3600)
    page = capsys.readouterr().out
    for line in (
        r"convnext_atto on v5e:2x2",
        r"chips +4 on 1 host; mesh data 4, fsdp 1",
        rf"parameters +{made.parameters:,}",
        r"batch +32, 8 a chip",
        r"schedule +40 steps; 1,438 images an epoch",
        r"temporaries +4\.00 GiB",
        r"together +4\.00 GiB of 15\.75 GiB \(25%\), fits",
        r"computation +2\.66 ms, the compiler's cycles at 1\.50 GHz",
        r"whole schedule +0\.0 h",
        r" 75\.0%  stages_0 dwconv forward +1 operations",
        r" 25\.0%  head backward +1 operations",
        r"all-reduce +1 × +4\.00 MB +0\.040 ms at least",
        r"1 operations without estimate count nothing: 1 custom-call",
        r"compiled on \d{4}-\d\d-\d\d by jax [\d.]+, libtpu 1\.2\.3; estimates, no measurements",
    ):
        assert re.search(line, page), line


def test_memory_is_that_of_the_shards(compiler):
    (made,) = planned("--topology", "v5e:2x2")
    memory = made.memory
    assert memory.parameters == memory.average == 4 * made.parameters
    # Two moments, and the count of steps in each of the optimizer's two counters.
    assert memory.optimizer == 2 * 4 * made.parameters + 2 * 4
    assert memory.batch == 8 * (8 * 8 * 3 + 4)
    assert memory.waiting == 3 * memory.batch
    # The step's count and that of left-out steps are arguments too, and lie in the padding.
    assert memory.padding == 500
    assert memory.program == 3000 + 20
    known = (memory.parameters, memory.optimizer, memory.average, memory.batch, memory.waiting)
    assert memory.total == sum(known) + 500 + memory.temporaries + memory.program


def test_sharded_memory_is_less(compiler):
    wider = "--config.model.overrides.dims=(128, 256)"
    (whole,) = planned("--topology", "v5e:2x2", wider)
    (cut,) = planned("--topology", "v5e:2x2", wider, "--config.mesh.fsdp=4")
    assert cut.mesh == {"data": 1, "fsdp": 4}
    assert cut.memory.batch == whole.memory.batch
    for kind in ("parameters", "optimizer", "average"):
        assert getattr(cut.memory, kind) < getattr(whole.memory, kind) / 3


def test_what_does_not_fit_says_by_how_much_and_what_would_help(compiler, capsys):
    compiler.per_image, compiler.remat_saves = 3 * GIB, 0.5
    (made,) = planned("--topology", "v5e:2x2")
    assert not made.fits
    assert made.step is made.mfu is made.hours is None
    assert compiler.asked == [(8, False), (8, True)]
    page = capsys.readouterr().out
    assert re.search(r"together +24\.00 GiB of 15\.75 GiB \(152%\), DOES NOT FIT", page)
    assert re.search(r"remat=true +12\.00 GiB  fits \(compiled\)", page)
    assert re.search(r"accumulation_steps=2 +12\.00 GiB  fits \(by proportion\)", page)
    assert re.search(r"mesh.fsdp=4 +24\.00 GiB  still too much \(the state's share is", page)
    assert re.search(r"batch_size=20 +15\.00 GiB  fits \(5 images a chip; by proportion\)", page)
    assert "the compiler said: RESOURCE_EXHAUSTED: Ran out of memory on HBM." in page


def test_what_is_refused_without_a_figure(compiler, capsys):
    compiler.per_image, compiler.remat_saves, compiler.says_figures = 3 * GIB, 0.1, False
    (made,) = planned("--topology", "v5e:2x2", "--max-batch")
    assert not made.fits
    assert made.largest.images == 4
    page = capsys.readouterr().out
    assert re.search(r"together +more than 15\.75 GiB, DOES NOT FIT", page)
    assert "by proportion" not in page
    assert re.search(r"remat=true +still too much \(compiled", page)


def test_the_largest_batch(compiler, capsys):
    (made,) = planned("--topology", "v5e:2x2", "--max-batch")
    assert made.largest.images == 24
    assert made.largest.refused == 32
    assert re.search(
        r"largest batch +24 images a chip, 12\.00 GiB; 32 do not fit", capsys.readouterr().out
    )


def test_the_largest_batch_is_dealt_out_evenly(compiler):
    (made,) = planned("--topology", "v5e:2x2", "--max-batch", "--config.optim.accumulation_steps=4")
    assert made.largest.images == 16


def test_topologies_side_by_side(compiler, capsys, tmp_path):
    file = tmp_path / "plans.json"
    compiler.per_image = 3 * GIB
    plans = planned("--compare", "v5e:2x2", "v6e:2x2", "--json", str(file))
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    assert table[2].startswith("| convnext_atto | v5e:2x2 | 8 | 24.00 GiB of 15.75 GiB | no |  |")
    assert table[3].startswith(
        "| convnext_atto | v6e:2x2 | 8 | 24.00 GiB of 31.24 GiB | yes | 2.3 ms"
    )
    # A table asks for no remedy.
    assert compiler.asked == [(8, False), (8, False)]
    stored = json.loads(file.read_text())
    assert [one["topology"] for one in stored] == ["v5e:2x2", "v6e:2x2"]
    assert stored[1]["step"]["seconds"] == plans[1].step.seconds
    assert stored[1]["memory"]["total"] == plans[1].memory.total
    assert stored[0]["mfu"] is None


def test_mistakes_end_in_a_sentence(compiler, capsys, tmp_path):
    def sentence(*arguments):
        assert cli.run(plan.main, ["--config", CONFIG, "--topology", "v5e:2x2", *arguments]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    file = tmp_path / "there.json"
    file.write_text("mine")
    assert f"{file} exists already; give another name, or --overwrite" in sentence(
        "--json", str(file)
    )
    assert file.read_text() == "mine"
    assert "config.batch_size = 30 can't be divided evenly among 4 devices" in sentence(
        "--config.batch_size=30"
    )
    assert "'folder' has in 'train' is not known here; give --examples N" in sentence(
        "--config.data.name=folder"
    )
    assert "'digits' has in 'train[:9%]' is not known" in sentence(
        "--config.data.train_split=train[:9%]"
    )
    assert "give --config.model.num_classes=K" in sentence(
        "--config.data.name=folder", "--examples=100"
    )
    assert "--examples is 0; it must be 1 or more" in sentence("--examples=0")
    assert "asks for data × fsdp" in sentence("--config.mesh.data=3")
    assert compiler.asked == []


def test_a_folder_of_known_size(compiler):
    (made,) = planned(
        "--topology",
        "v5e:2x2",
        "--config.data.name=folder",
        "--examples=6400",
        "--config.model.num_classes=7",
        "--config.total=3 epochs",
        "--config.optim.warmup=0 epochs",
    )
    assert (made.examples, made.steps) == (6400, 600)


def test_known_sizes_are_those_of_the_data(tmp_path):
    from convnext_jax.data.sources import open_source

    digits = open_source("digits", "train")
    assert KNOWN["digits"] == (len(digits), digits.num_classes)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v4:2x2x1", "v6e:2x2"])
def test_the_tpu_compiler(topology, capsys):
    """The digits' step on each chip: all of it accounted for, and nothing exchanged by accident."""
    pytest.importorskip("libtpu")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        (made,) = planned("--topology", topology)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    capsys.readouterr()
    assert made.fits
    assert made.chips == 4
    assert made.memory.padding > 0
    assert made.memory.temporaries > 0
    assert 0 < made.step.computation < 0.1
    parts = {(one.part, one.direction) for one in made.step.parts}
    assert {
        ("stages_0 dwconv", "forward"),
        ("stages_1 dwconv", "backward"),
        ("stem", "backward"),
        ("head", "forward"),
        ("augmentation", ""),
        ("mixing", ""),
        ("optimizer and average", ""),
    } <= parts
    named = sum(one.cycles for one in made.step.parts if one.part != "copies without a name")
    assert named > 0.9 * sum(one.cycles for one in made.step.parts)
    # Gradients and the loss are summed once; no image and no activation leaves its chip.
    (exchange,) = made.step.exchanges
    assert exchange.kind == "all-reduce"
    assert 4 * made.parameters <= exchange.bytes < 4 * made.parameters * 1.05 + 1024
