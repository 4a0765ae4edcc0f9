"""What lies in a trace that `--profile` has written."""

import warnings
from pathlib import Path
from typing import NamedTuple

import jax


class Span(NamedTuple):
    """An event of the host, in nanoseconds from the trace's beginning."""

    name: str
    start: float
    end: float


class Trace:
    """The host's events of the one trace in a directory.

    Attributes:
      steps: the training steps, by their numbers.
    """

    def __init__(self, directory: Path) -> None:
        (path,) = directory.glob("plugins/profile/*/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        (host,) = (plane for plane in data.planes if plane.name == "/host:CPU")
        self._spans = []
        self.steps = {}
        with warnings.catch_warnings():
            # jaxlib 0.12's iterators name no module, and as an error that ends the process.
            warnings.simplefilter("ignore", DeprecationWarning)
            for event in (event for line in host.lines for event in line.events):
                span = Span(event.name, event.start_ns, event.end_ns)
                self._spans.append(span)
                if event.name == "train":
                    self.steps[dict(event.stats)["step_num"]] = span

    def named(self, *parts: str) -> list[Span]:
        """Those whose names hold one of the parts."""
        return [span for span in self._spans if any(part in span.name for part in parts)]
