"""The processes of a run: a frozen World holds the rank of this one, and the collectives between them.

    control     a gloo group on the CPU: signals, sums of validation, errors. Its timeout is long, since rank 0 may be
                writing a checkpoint. A process that dies is noticed at once, since its sockets close; a machine that
                loses power or network within half a minute, since it no longer answers the kernel (sockets.py)
    gradients   NCCL on CUDA, else gloo: DDP's buckets and the loss; on CUDA with a timeout of one minute

In a World of one process every collective returns at once, at no cost, so the rest of the code is the same for one
process and for many.

Batch i of a run is a pure function of i (data/loader.py). Rank r takes the batches r, r + size, r + 2 size, ... of each
step, so N ranks read in each step what one rank reads with N times the accumulation, and a run that was saved on N
ranks resumes on M.

ZeRO-1: Rajbhandari et al. 2020, arXiv:1910.02054, stage 1 (P_os).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gpt2fast.errors import UserError
from gpt2fast.machine.sockets import notice_lost_hosts

PATIENCE = timedelta(hours=2)  # timeout of the control group: rank 0 may be writing a large checkpoint to a slow disk
HANG = timedelta(minutes=1)  # timeout of NCCL, which does not notice that a machine has lost power


@dataclass(frozen=True)
class World:
    """This process's rank among `size` processes. `local_rank` counts within the machine: it is the GPU's index."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    gradients: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this rank logs and saves."""
        return self.rank == 0

    def on(self, device: torch.device) -> "World":
        """Return this World with a group for gradients. Collective: every rank must call it."""
        if self.size == 1:
            return self
        cuda = device.type == "cuda"
        group = dist.new_group(backend="nccl" if cuda else "gloo", timeout=HANG if cuda else PATIENCE)
        assert isinstance(group, dist.ProcessGroup), "every rank is in it"
        notice_lost_hosts()
        return replace(self, gradients=group)

    def replicate(self, module: nn.Module) -> nn.Module:
        """Return `module` wrapped in DDP, which averages gradients in backward and keeps them in its buckets."""
        if self.size == 1:
            return module
        return DistributedDataParallel(module, process_group=self.gradients, gradient_as_bucket_view=True)

    def largest(self, number: int) -> int:
        """Return the largest of all ranks' numbers on every rank, for example a signal that one of them received.

        The CPU waits, and not the GPU.
        """
        if self.size == 1:
            return int(number)
        most = torch.tensor([int(number)])
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def mean_(self, x: Tensor) -> None:
        """Replace the 0-d tensor `x`, on the device, by its mean over ranks."""
        if self.size > 1:
            dist.all_reduce(x.div_(self.size), group=self.gradients)

    def totals(self, *numbers: float) -> list[float]:
        """Return each number's sum over ranks, in float64, on every rank."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(sums)
        return sums.tolist()

    def all_gather(self, text: str) -> list[str]:
        """Return every rank's text, in order of rank, on every rank.

        Sent as bytes: torch's own gathering of objects would unpickle them.
        """
        if self.size == 1:
            return [text]
        data = text.encode()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]))
        longest = max(map(int, lengths))
        rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(rows, torch.tensor(list(data.ljust(longest, b"\0")), dtype=torch.uint8))
        return [bytes(row.tolist()[: int(n)]).decode() for row, n in zip(rows, lengths)]

    def broadcast(self, text: str) -> str:
        """Return rank 0's text on every rank."""
        return self.all_gather(text if self.main else "")[0]

    def check_same(self, values: dict[str, object]) -> None:
        """Raise UserError if a rank's value differs from rank 0's."""
        mine = json.dumps({name: str(value) for name, value in values.items()})
        first, *others = map(json.loads, self.all_gather(mine))
        for rank, other in enumerate(others, 1):
            for name, value in other.items():
                if value != first[name]:
                    raise UserError(
                        f"rank {rank} has {name.replace('_', ' ')} {value}, and rank 0 {first[name]}: every process "
                        "must see the same files and run the same program"
                    )

    def interleave(self, mine: list[str], count: int) -> list[str]:
        """Return `count` texts in order on every rank; rank r passes those with the indices r, r + size, ..."""
        hands = [json.loads(text) for text in self.all_gather(json.dumps(mine))]
        return [hands[i % self.size][i // self.size] for i in range(count)]

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        self.largest(0)

    def gather_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return all ranks' tensors on rank 0, on the CPU, and an empty dict on the others."""
        lists = [json.loads(text) for text in self.all_gather(json.dumps(_describe(tensors)))]
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
    """Return a ZeRO-1 optimizer: each rank keeps moments for its share of the weights only, updates that share, and
    sends it to the others.

    The weights are bit for bit those that `make(groups, **settings)` computes on every rank.
    """
    # imported here, since it takes a second that most programs do not need
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, make, process_group=world.gradients, **settings)  # type: ignore[arg-type]


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that does the work on this rank, which a ZeRO-1 optimizer wraps."""
    return getattr(optimizer, "optim", optimizer)
