"""A simulated clock, for code that measures or waits: it advances when the test says so, on a busy machine too."""


class Clock:
    """A stand-in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    monotonic = perf_counter

    def sleep(self, seconds: float) -> None:
        self.now += seconds
