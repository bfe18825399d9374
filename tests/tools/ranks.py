"""Programs of ours in several processes that torchrun's environment joins, on one CPU thread each."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore

from tests.tools import programs
from tests.tools.programs import Program


@dataclass
class Rank:
    """A process, with all that it has printed once it has ended."""

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
        """Without torch's own warnings, of a host that has no name for instance."""
        return re.sub(r"^\[W\d.*\[c10d\].*\n", "", self.printed.read_text(), flags=re.MULTILINE)


def start(
    work: Callable[..., int | None], size: int, folder: Path, *args, name: str = "rank", interpret: bool = False
) -> list[Rank]:
    """`size` processes that call work(*args) in `folder`, a main of ours for instance; `interpret`: Triton does."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has it
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
    """The same, until they have ended. They must have ended well."""
    ranks = start(work, size, folder, *args, **options)
    codes = [rank.end() for rank in ranks]
    assert codes == [0] * size, "\n".join(rank.text for rank in ranks)
    return ranks


def _run(work: Callable[..., int | None], args: tuple) -> int:
    from gpt2fast import train
    from gpt2fast.errors import RunError, UserError

    train.draw_loss_curve = lambda s: None  # a picture takes longer than the run
    try:
        return work(*args) or 0
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
