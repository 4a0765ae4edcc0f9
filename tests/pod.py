"""Several processes of the training program on this machine, as a pod has one on each host."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

from runs import command


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Pod:
    """`python -m convnext_jax.train` in `processes` processes of `devices` devices each."""

    def __init__(self, workdir, *overrides, processes, devices, environment=None, program=None):
        self.workdir = workdir
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2 * processes)]  # noqa: SIM115
        port = free_port()
        start = command(workdir, *overrides) if program is None else program
        flags = f"--xla_force_host_platform_device_count={devices}"
        self.processes = [
            subprocess.Popen(
                start
                if processes == 1
                else [
                    *start,
                    *("--coordinator", f"localhost:{port}"),
                    *("--num_processes", str(processes), "--process_id", str(index)),
                ],
                stdout=self._files[2 * index],
                stderr=self._files[2 * index + 1],
                env={**os.environ, "XLA_FLAGS": flags, **(environment or {})},
            )
            for index in range(processes)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.wait()
        for file in self._files:
            file.close()

    def wait(self, seconds=300):
        """The exit statuses, once all have ended."""
        end = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(end - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"process hangs: {self.printed()}") from None
        return [process.returncode for process in self.processes]

    def out(self, index):
        return self._text(2 * index)

    def err(self, index):
        return self._text(2 * index + 1)

    def printed(self):
        return [self._text(i) for i in range(len(self._files))]

    def wait_until(self, holds, seconds=240):
        end = time.monotonic() + seconds
        while not holds():
            ended = [process.poll() for process in self.processes]
            assert all(status is None for status in ended), f"{ended}: {self.printed()}"
            assert time.monotonic() < end, f"nothing happened: {self.printed()}"
            time.sleep(0.005)

    def signal(self, index, number=signal.SIGTERM):
        self.processes[index].send_signal(number)

    def _text(self, number):
        self._files[number].flush()
        with open(f"/proc/self/fd/{self._files[number].fileno()}") as file:
            text = file.read()
        # Of the collectives' own lines each process prints some, from several threads, so that they
        # may tear each other; and C++ what it finds remarkable.
        foreign = re.compile(r"\[Gloo\]|[IW]\d{4} |.*connected peer ranks|\s*$")
        return "".join(line for line in text.splitlines(True) if not foreign.match(line))


def python(*arguments):
    return [sys.executable, *arguments]
