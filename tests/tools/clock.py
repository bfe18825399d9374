"""A clock of one's own, for what measures or waits: it moves when the test says so, however busy the machine is."""


class Clock:
    """Stands for the module `time` where that is patched."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    monotonic = perf_counter

    def sleep(self, seconds: float) -> None:
        self.now += seconds
