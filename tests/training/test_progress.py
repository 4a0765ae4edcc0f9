import io

from convnext_jax.training.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_rate_and_time_left_are_of_what_comes_after_the_first_batch():
    stream, clock = Terminal(), Clock()
    bar = ProgressBar(1000, label="set", stream=stream, clock=clock)
    clock.now = 60.0  # the compilation
    bar.advance(200)
    assert bar.images_per_second is None
    clock.now = 61.0
    bar.advance(100, "top-1 50.00%")
    assert bar.images_per_second == 100
    assert stream.getvalue().endswith(
        "set  [#######.................]  300/1,000  100 img/s  ETA 7.0s  top-1 50.00%"
    )
    clock.now = 61.1
    bar.advance(100)
    assert "400/1,000" not in stream.getvalue(), "shown five times a second at most"
    clock.now = 61.15
    bar.advance(600)
    assert "[########################]  1,000/1,000" in stream.getvalue(), "but always at the end"
    bar.close()
    assert stream.getvalue().endswith("\n")


def test_off_a_terminal_lines_are_few():
    stream, clock = io.StringIO(), Clock()
    bar = ProgressBar(10_000, stream=stream, clock=clock)
    for second in range(100):
        clock.now = float(second)
        bar.advance(100)
    bar.close()
    assert stream.getvalue().count("\n") == 5
    assert "\x1b" not in stream.getvalue()
