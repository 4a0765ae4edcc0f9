"""What `gpu.py` sets against each other: a network of this library, and timm's.

Each is a function without arguments that makes one pass, and knows its peak of memory and where its
time goes.
"""

import functools
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

# Else JAX takes three quarters of the memory at its first array. Read when its backend starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import torch
from jax_training import training_step
from torch import nn

from convnext_jax.analysis.cost import model_part
from convnext_jax.analysis.hlo import Operation
from convnext_jax.analysis.hlo_text import parse
from convnext_jax.models import create_model
from convnext_jax.training.optim import adamw

PARITY = Path(__file__).parents[1] / "tests" / "parity"
CLASSES = 1000
TRACED_STEPS = 3


def imported_timm():
    """timm, which imports torchvision, also where that does not fit the PyTorch beside it."""
    sys.path.insert(0, str(PARITY))
    from torchvision_operators import define_missing_operators

    define_missing_operators()
    import timm

    return timm


class JaxContender:
    """A compiled program with what it works on, called without arguments."""

    def __init__(self, name, mode, batch_size, image_size, overrides):
        """Compiles `mode`, "inference" or "training", and lays weights and images ready."""
        model = create_model(
            name, num_classes=CLASSES, drop_path_rate=0.1, dtype=jnp.bfloat16, **overrides
        )
        shape = (batch_size, image_size, image_size, 3)
        images = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
        labels = jnp.arange(batch_size) % CLASSES
        # It runs once, and on the CPU XLA would optimise it for longer than all the rest.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
        init = jax.jit(lambda key: model.init(key, images[:1])["params"], compiler_options=quick)
        params = init(jax.random.key(0))
        if mode == "inference":
            forward = jax.jit(lambda params, images: model.apply({"params": params}, images))
            self.compiled = forward.lower(params, images).compile()
            self._call = functools.partial(self.compiled, params, images)
            return
        optimizer = adamw(lambda _: 1e-4, depths=model.depths, weight_decay=0.05)

        initial, step = training_step(model, optimizer)
        self._state = jax.jit(initial)(params)
        self.compiled = jax.jit(step, donate_argnums=0).lower(self._state, images, labels).compile()

        def call():
            self._state, loss = self.compiled(self._state, images, labels)
            return loss

        self._call = call

    def __call__(self):
        """One call; the result may be a promise."""
        return self._call()

    def peak_bytes(self):
        """What the program takes at its widest: arguments, results, temporaries."""
        memory = self.compiled.memory_analysis()
        return (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )

    def profile(self):
        """Seconds of one call by part of the network and direction, the longest first."""
        module = parse(self.compiled.as_text())
        parts = {
            one.name: _part(one, training=hasattr(self, "_state"))
            for computation in module.computations.values()
            for one in computation.values()
        }
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory):
                for _ in range(TRACED_STEPS):
                    jax.block_until_ready(self())
            (path,) = Path(directory).glob("plugins/profile/*/*.xplane.pb")
            seconds = Counter()
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for event in (event for line in plane.lines for event in line.events):
                    operation = dict(event.stats).get("hlo_op")
                    if operation is not None:
                        part = parts.get(operation, "operations without a name")
                        seconds[part] += event.duration_ns / 1e9 / TRACED_STEPS
        return seconds.most_common()


def _part(instruction, *, training):
    """The part of the network that an instruction belongs to, and the direction."""
    fields = (instruction.name, instruction.opcode, instruction.source, 0, 1)
    part, direction = model_part(Operation(*fields, instruction.result_bytes))
    if not training and part == "optimizer and average":
        return "pooling and head"  # what stands outside stem and stages, without a gradient
    return f"{part} {direction}".strip()


class Launched:
    """A call of PyTorch that is under way; waited for as `jax.block_until_ready` waits."""

    def __init__(self, device):
        self._device = device

    def block_until_ready(self):
        """Waits for all of the GPU's work."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        return self


class TimmContender:
    """timm's network, called without arguments."""

    def __init__(self, name, mode, batch_size, image_size, overrides, *, device, compiled):
        """Builds `mode`, "inference" or "training"; torch.compile compiles at the first call."""
        self._device = device
        memory_format = torch.channels_last
        model = imported_timm().create_model(
            name, num_classes=CLASSES, drop_path_rate=0.1, **overrides
        )
        model = model.to(device=device, memory_format=memory_format)
        images = torch.randn(batch_size, 3, image_size, image_size, device=device)
        images = images.to(dtype=torch.bfloat16, memory_format=memory_format)
        labels = torch.arange(batch_size, device=device) % CLASSES
        network = torch.compile(model) if compiled else model

        def forward():
            with torch.autocast(device, torch.bfloat16):
                return network(images)

        if mode == "inference":
            model.eval()

            def call():
                with torch.inference_mode():
                    forward()
        else:
            model.train()
            decayed = [p for p in model.parameters() if p.ndim > 1]
            kept = [p for p in model.parameters() if p.ndim <= 1]
            groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.05, fused=True)
            loss_of = nn.CrossEntropyLoss()

            def call():
                optimizer.zero_grad(set_to_none=True)
                loss_of(forward().float(), labels).backward()
                optimizer.step()

        self._call = call

    def __call__(self):
        """One call; the GPU may still be at it."""
        self._call()
        return Launched(self._device)

    def peak_bytes(self):
        """The allocator's peak over one call, weights included; None on a CPU."""
        if self._device != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self().block_until_ready()
        return torch.cuda.max_memory_allocated()

    def profile(self):
        """Seconds of one call by operation of PyTorch, the longest first."""
        with torch.profiler.profile() as profiler:
            for _ in range(TRACED_STEPS):
                self()
            Launched(self._device).block_until_ready()
        field = "self_device_time_total" if self._device == "cuda" else "self_cpu_time_total"
        seconds = Counter()
        for event in profiler.key_averages():
            if (microseconds := getattr(event, field)) > 0:
                seconds[event.key] += microseconds / 1e6 / TRACED_STEPS
        return seconds.most_common()
