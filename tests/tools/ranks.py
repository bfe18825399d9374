"""Programs of ours in several processes that torchrun's environment joins, on one CPU thread each.

They are forked from one process that has imported everything already: a rank starts in a tenth of a second, not four.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore

from tests.tools.accounts import program_starts
from tests.tools.programs import HANG

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "gpt2fast.train", "gpt2fast.evaluate", "tyro", "torch._dynamo", "torch.distributed.optim", "tests.tools.ranks",
])  # fmt: skip


@dataclass
class Rank:
    """A process, with all that it has printed once it has ended."""

    process: multiprocessing.Process
    printed: Path
    store: TCPStore

    def end(self, seconds: float = HANG) -> int:
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s; it printed\n{self.text}")
        return self.process.exitcode

    @property
    def text(self) -> str:
        return self.printed.read_text()


def start(work: Callable[..., int | None], size: int, folder: Path, *args, name: str = "rank") -> list[Rank]:
    """`size` processes that call work(*args) in `folder`, a main of ours for instance."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has it
    ranks = []
    for rank in range(size):
        printed = folder / f"{name}{rank}.txt"
        world = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
        }
        world["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        process = CONTEXT.Process(target=_run, args=(work, args, folder, printed, world))
        program_starts()
        process.start()
        ranks.append(Rank(process, printed, store))
    return ranks


def run(work: Callable[..., int | None], size: int, folder: Path, *args, name: str = "rank") -> list[Rank]:
    """The same, until they have ended. They must have ended well."""
    ranks = start(work, size, folder, *args, name=name)
    codes = [rank.end() for rank in ranks]
    assert codes == [0] * size, "\n".join(rank.text for rank in ranks)
    return ranks


def _run(work: Callable, args: Sequence, folder: Path, printed: Path, world: dict) -> None:
    import torch

    from gpt2fast import train
    from gpt2fast.errors import UserError

    os.chdir(folder)
    os.environ |= {name: str(value) for name, value in world.items()}
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    train.draw = lambda s: None  # a picture takes longer than the run
    try:
        code = work(*args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    os._exit(code or 0)
