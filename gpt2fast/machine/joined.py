"""How the processes of a run start and end together: `joined` makes a World from torchrun's environment.

The rank that ends the run writes the cause to torchrun's store. The next collective of the other ranks then fails; they
read the cause from the store and print it.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch.distributed as dist

from gpt2fast.errors import UserError, one_line
from gpt2fast.machine.sockets import hang_up, notice_lost_hosts
from gpt2fast.machine.world import ALONE, PATIENCE, World

ROLL_CALL = 15.0  # seconds for survivors to answer; torchrun kills them after 30


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Yield the World that torchrun's environment describes, or a World of one process without torchrun.

    Ranks other than 0 print nothing. An error that leaves the block ends this process, and soon after it the others.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    world, store = _join()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if world.main else nowhere):
        try:
            yield world
            world.barrier()  # a gloo process that exits before the others may make them fail
        except BaseException as error:
            _leave(world, store, error)
    dist.destroy_process_group()


@contextlib.contextmanager
def one_complains(world: World) -> Iterator[None]:
    """Silence stderr on ranks other than 0: a command line that is wrong on one rank is wrong on all."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(sys.stderr if world.main else nowhere):
        yield


def _join() -> tuple[World, dist.Store]:
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore("gpt2fast", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
        notice_lost_hosts()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"could not connect WORLD_SIZE={os.environ['WORLD_SIZE']} processes ({one_line(error)}): "
            "start them with torchrun; on several machines, each must reach MASTER_ADDR:MASTER_PORT, and "
            "GLOO_SOCKET_IFNAME may have to name the network interface"
        ) from None
    return World(rank, size, int(os.environ.get("LOCAL_RANK", rank))), store


def _leave(world: World, store: dist.Store, error: BaseException) -> NoReturn:
    """Record and print why, then exit at once: a collective that other ranks wait in, or NCCL, may never return."""
    gone = isinstance(error, RuntimeError) and ("gloo" in str(error).lower() or isinstance(error, dist.DistError))
    text, code = (f"the other ranks cannot be reached ({one_line(error)})", 1) if gone else _cause(error)
    with contextlib.suppress(RuntimeError):  # without torchrun the store lives in rank 0, and ends with it
        if gone:
            text = _who_is_gone(world, store)
        else:
            store.set(f"cause/{world.rank}", text)
            if not world.main and _within(3.0, lambda: _causes(world, store).get(0) == text):
                text = ""  # rank 0 prints the same
    if text:
        print(f"error: rank {world.rank}: {text}" if code else text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _cause(error: BaseException) -> tuple[str, int]:
    if isinstance(error, UserError):
        return one_line(error), error.exit_code
    if isinstance(error, SystemExit):
        return f"exit code {error.code}", error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    traceback.print_exception(error)
    return f"{type(error).__name__}: {one_line(error)}", 1


def _who_is_gone(world: World, store: dist.Store) -> str:
    """Return a message that names the ranks that ended, on the first of the survivors; "" on the others."""
    store.set(f"alive/{world.rank}", "")
    hang_up()
    # Closes connections where there is no /proc too. A thread, because it may itself wait for other ranks
    threading.Thread(target=dist.destroy_process_group, daemon=True).start()

    def silent() -> list[int]:
        return [rank for rank in range(world.size) if not store.check([f"alive/{rank}"])]

    def all_have_answered() -> bool:
        """Return whether all but one have answered, or all but those that recorded a cause.

        Otherwise two survivors might each take themselves for the first.
        """
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
        what = f"rank {ranks} disappeared without an error: killed, out of memory, or its machine is down"
    return f"{what}; the saved checkpoints are complete: continue with --resume"


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
