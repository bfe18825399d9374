"""Many processes, one model: torchrun's environment -> a frozen World.

    control     a gloo group of the hosts: signals, sums of validation, errors. It may wait long, for rank 0 may be
                writing a checkpoint; a process that is gone is noticed at once, since its sockets close, and a machine
                without power or network in half a minute, since it does not answer the kernel
    gradients   NCCL on CUDA, else gloo: DDP's buckets and the loss; on CUDA nobody is waited for longer than a minute

A World of one process does all of this at once, at no cost: the rest of the code does not ask how many there are.

Batch i of a run is a pure function of i (data.py). Of the batches of a step rank r takes every size-th from the r-th
on, so N ranks read in each step what one rank reads with N times the accumulation, and a run saved on N goes on on M.

Whoever ends the run leaves its cause in torchrun's store; the others, whose next collective fails, find it there and
say it. Source of ZeRO-1: Rajbhandari et al. 2020, arXiv:1910.02054, stage 1 (P_os).
"""

import contextlib
import json
import os
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gpt2fast.errors import UserError

PATIENCE = timedelta(hours=2)  # of the hosts: rank 0 may be writing a large checkpoint to a slow disk
HANG = timedelta(minutes=1)  # of NCCL, which does not notice that a machine has lost its power
LOST = 30  # seconds after which a host that does not answer counts as gone
ROLL_CALL = 15.0  # seconds for survivors to answer; torchrun kills them after 30


@dataclass(frozen=True)
class World:
    """Who this process is among how many. `local_rank` counts within the machine: it is the number of the GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    gradients: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether it is this one that logs and saves."""
        return self.rank == 0

    def on(self, device: torch.device) -> "World":
        """The same, with a group for gradients. Collective: every rank calls it."""
        if self.size == 1:
            return self
        cuda = device.type == "cuda"
        group = dist.new_group(backend="nccl" if cuda else "gloo", timeout=HANG if cuda else PATIENCE)
        assert isinstance(group, dist.ProcessGroup), "every rank is in it"
        _notice_lost_hosts()
        return replace(self, gradients=group)

    def replicate(self, module: nn.Module) -> nn.Module:
        """`module` with DDP around it: gradients are averaged in backward, and lie in DDP's buckets from then on."""
        if self.size == 1:
            return module
        return DistributedDataParallel(module, process_group=self.gradients, gradient_as_bucket_view=True)

    def any(self, number: int) -> int:
        """The largest of all ranks' numbers, such as signals: what one has seen, all know. The hosts wait."""
        if self.size == 1:
            return int(number)
        most = torch.tensor([int(number)])
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def mean_(self, x: Tensor) -> None:
        """Put the mean over ranks into the 0-d `x`, on the device."""
        if self.size > 1:
            dist.all_reduce(x.div_(self.size), group=self.gradients)

    def totals(self, *numbers: float) -> list[float]:
        """Sums over ranks, in float64."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(sums)
        return sums.tolist()

    def gather(self, text: str) -> list[str]:
        """Every rank's text, on every rank. As bytes: torch's own gathering of objects would unpickle them."""
        if self.size == 1:
            return [text]
        data = text.encode()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]))
        longest = max(map(int, lengths))
        rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(rows, torch.tensor(list(data.ljust(longest, b"\0")), dtype=torch.uint8))
        return [bytes(row.tolist()[: int(n)]).decode() for row, n in zip(rows, lengths)]

    def share(self, text: str) -> str:
        """Rank 0's text."""
        return self.gather(text if self.main else "")[0]

    def check_same(self, values: dict[str, object]) -> None:
        """UserError if a rank has another value than rank 0."""
        first, *others = map(json.loads, self.gather(json.dumps({name: str(value) for name, value in values.items()})))
        for rank, other in enumerate(others, 1):
            for name, value in other.items():
                if value != first[name]:
                    raise UserError(
                        f"rank {rank} has {name.replace('_', ' ')} {value}, and rank 0 {first[name]}: every process "
                        "must see the same files and run the same program"
                    )

    def deal(self, mine: list[str], count: int) -> list[str]:
        """`count` texts in order on every rank, where rank r has those with the numbers r, r + size, ..."""
        hands = [json.loads(text) for text in self.gather(json.dumps(mine))]
        return [hands[i % self.size][i // self.size] for i in range(count)]

    def wait(self) -> None:
        """Until every rank is here."""
        self.any(0)

    def collect(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of tensors that lie on some rank each: all of them on rank 0, on the CPU, and on the others nothing."""
        lists = [json.loads(text) for text in self.gather(json.dumps(_describe(tensors)))]
        found = {name: tensor.cpu() for name, tensor in tensors.items()} if self.main else {}
        for rank, described in enumerate(lists[1:], 1):
            for name, (shape, dtype) in described.items():
                if self.main:
                    found[name] = torch.empty(shape, dtype=getattr(torch, dtype))
                    dist.recv(found[name], rank)
                elif self.rank == rank:
                    dist.send(tensors[name].detach().cpu().contiguous(), 0)
        return found


ALONE = World()


def _describe(tensors: dict[str, Tensor]) -> dict[str, tuple[list[int], str]]:
    return {name: (list(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in tensors.items()}


def shard(make: Callable[..., Optimizer], groups: list[dict], world: World, **settings) -> Any:
    """ZeRO-1: each rank has the moments of its share of the weights only, updates those, and sends them to the others.

    Bit for bit what `make(groups, **settings)` does on every rank.
    """
    # imported here: it takes a second, which most programs need not wait
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, make, process_group=world.gradients, **settings)  # type: ignore[arg-type]


def part(optimizer: Optimizer) -> Optimizer:
    """The optimizer that does the work on this rank: ZeRO-1 has it inside."""
    return getattr(optimizer, "optim", optimizer)


# ---- beginning and end ----


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The World of torchrun's environment, or of one process where there is none.

    On other ranks than 0 nothing is printed. An error that leaves it ends this process, and soon the others.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    world, store = _join()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if world.main else nowhere):
        try:
            yield world
            world.wait()  # a gloo process that leaves before the others may take them along
        except BaseException as error:
            _leave(world, store, error)
    dist.destroy_process_group()


@contextlib.contextmanager
def one_complains(world: World) -> Iterator[None]:
    """For a command line, which is wrong on every rank if it is on one."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(sys.stderr if world.main else nowhere):
        yield


def _join() -> tuple[World, dist.Store]:
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore("gpt2fast", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
        _notice_lost_hosts()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and so many processes do not come together ({_line(error)}): "
            "start them with torchrun; on several machines, each must reach MASTER_ADDR:MASTER_PORT, and "
            "GLOO_SOCKET_IFNAME may have to name the network interface"
        ) from None
    return World(rank, size, int(os.environ.get("LOCAL_RANK", rank))), store


def _leave(world: World, store: dist.Store, error: BaseException) -> NoReturn:
    """Say why, for others to find it, and end at once: what other ranks wait for, or NCCL, may never return."""
    gone = isinstance(error, RuntimeError) and ("gloo" in str(error).lower() or isinstance(error, dist.DistError))
    text, code = (f"the others cannot be reached ({_line(error)})", 1) if gone else _cause(error)
    with contextlib.suppress(RuntimeError):  # without torchrun the store is in rank 0, and gone with it
        if gone:
            text = _who_is_gone(world, store)
        else:
            store.set(f"cause/{world.rank}", text)
            if not world.main and _within(3.0, lambda: _causes(world, store).get(0) == text):
                text = ""  # rank 0 says the same
    if text:
        print(f"error: rank {world.rank}: {text}" if code else text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _cause(error: BaseException) -> tuple[str, int]:
    if isinstance(error, UserError):
        return _line(error), error.exit_code
    if isinstance(error, SystemExit):
        return f"exit code {error.code}", error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    traceback.print_exception(error)
    return f"{type(error).__name__}: {_line(error)}", 1


def _who_is_gone(world: World, store: dist.Store) -> str:
    """In words, for the first of the survivors; "" for the others."""
    store.set(f"alive/{world.rank}", "")
    _hang_up()
    # The same where there is no /proc. It may wait for others itself: hence a thread
    threading.Thread(target=dist.destroy_process_group, daemon=True).start()

    def silent() -> list[int]:
        return [rank for rank in range(world.size) if not store.check([f"alive/{rank}"])]

    def all_have_answered() -> bool:
        """All but one, or but those who said why they end; else two survivors may each think that they are first."""
        known = set(_causes(world, store))
        return set(silent()) <= known if known else len(silent()) <= 1

    _within(ROLL_CALL, all_have_answered)
    causes, lost = _causes(world, store), silent()
    if world.rank != min(set(range(world.size)) - set(lost), default=world.rank):
        return ""
    if causes:
        rank, text = next(iter(causes.items()))
        what = f"rank {rank} ended the run: {text}"
    else:
        ranks = ", ".join(map(str, lost))
        what = f"rank {ranks} is gone without a word: killed, out of memory, or its machine is gone"
    return f"{what}; what was saved is whole: continue with --resume"


def _hang_up() -> None:
    """Shut all connections but the store's, so that those notice who only wait for this process."""
    port = int(os.environ["MASTER_PORT"])
    for connection in _connections():
        with contextlib.suppress(OSError):  # some only listen
            if port not in (connection.getpeername()[1], connection.getsockname()[1]):
                connection.shutdown(socket.SHUT_RDWR)


def _notice_lost_hosts() -> None:
    """Ask the kernel for an error on connections to a host that has not answered for LOST seconds.

    One without power or network says no farewell, and gloo and the store would wait for as long as PATIENCE.
    """
    for connection in _connections():
        with contextlib.suppress(OSError):  # closed by now
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # while nothing is sent: ask
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LOST // 3)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LOST // 6)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST * 1000)  # while something is


def _connections() -> Iterator[socket.socket]:
    """The sockets of this process that lead to others, where there is a /proc: Linux."""
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # closed by now
            if stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    internet = connection.family in (socket.AF_INET, socket.AF_INET6)
                    if internet and connection.type == socket.SOCK_STREAM:
                        yield connection


def _causes(world: World, store: dist.Store) -> dict[int, str]:
    keys = {rank: f"cause/{rank}" for rank in range(world.size)}
    return {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}


def _within(seconds: float, done: Callable[[], object]) -> bool:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
