"""Our programs in several processes, joined by torchrun's environment, on one CPU thread each; and what they write."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore

from gpt2fast.training.run import read_metrics
from gpt2fast.weights import checkpoint
from tests.tools import programs, tiny
from tests.tools.programs import Program

FLAGS = [*tiny.FLAGS, "--total-batch", "128", "--steps", "8", "--grad-clip", "0.5"]  # 4 micro-batches of 2 x 16 a step


@dataclass
class Rank:
    """A process, and the file that it prints to."""

    process: Program | subprocess.Popen
    printed: Path
    store: TCPStore

    def end(self) -> int:
        try:
            return self.process.wait(programs.HANG)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {programs.HANG} s; it printed\n{self.text}") from None

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    @property
    def text(self) -> str:
        """What it has printed, without torch's own warnings (that a host has no name, for example)."""
        return re.sub(r"^\[W\d.*\[c10d\].*\n", "", self.printed.read_text(), flags=re.MULTILINE)


def start(
    work: Callable[..., int | None], size: int, folder: Path, *args, name: str = "rank", interpret: bool = False
) -> list[Rank]:
    """Start `size` processes that call work(*args) in `folder`; `interpret`: in Triton's interpreter."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as in torchrun
    world = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    world |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": 1}
    world |= {"TRITON_INTERPRET": 1} if interpret else {}
    ranks = []
    for rank in range(size):
        printed = folder / f"{name}{rank}.txt"
        env = {key: str(value) for key, value in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        ranks.append(Rank(programs.call(_run, work, args, cwd=folder, log=printed, env=env), printed, store))
    return ranks


def run(work: Callable[..., int | None], size: int, folder: Path, *args, **options) -> list[Rank]:
    """Start the processes and wait until they have ended, which must be with exit code 0."""
    ranks = start(work, size, folder, *args, **options)
    codes = [rank.end() for rank in ranks]
    assert codes == [0] * size, "\n".join(rank.text for rank in ranks)
    return ranks


def metrics(folder: Path, run: str) -> list[dict]:
    """Return the rows of metrics.jsonl of a run in `folder`."""
    return read_metrics(folder / "out" / run / "metrics.jsonl")


def newest(folder: Path, run: str) -> Path:
    """Return the newest checkpoint of a run in `folder`."""
    return checkpoint.list_checkpoints(folder / "out" / run / "checkpoints")[-1][1]


def _run(work: Callable[..., int | None], args: tuple) -> int:
    from gpt2fast import train
    from gpt2fast.errors import RunError, UserError

    train.draw_loss_curve = lambda s: None  # the picture takes longer than the run
    try:
        return work(*args) or 0
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
