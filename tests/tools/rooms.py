"""Which test file is a module's: tests/<room>/test_<module>.py. The rooms are the folders that modules will be in."""

from pathlib import Path

from tests.tools.checkout import CHECKOUT

ROOMS = {
    "model": "model ops reference cpu kernels auto measure",
    "data": "data corpus corpora encoding shards sources tokenizer",
    "weights": "checkpoint huggingface layout llmc nanogpt openai pretrained weights",
    "training": "config flops graph optim plot rounded run screen session spikes step",
    "inference": "cache decode hellaswag",
    "machine": "allocator device distributed machine",
    "files": "containers download files records",
    "programs": "errors evaluate export flags inspect pictures prepare sample train",
}
ROOM_OF = {module: room for room, modules in ROOMS.items() for module in modules.split()}
# Path of every module, from the checkout's root
FILES = sorted(
    f"{folder}/{path.name}"
    for folder in ("gpt2fast", "kernels", "benchmarks")
    for path in (CHECKOUT / folder).glob("*.py")
    if path.stem != "__init__" and not path.stem.startswith("bench_")
)


def tests_of(module: str) -> str:
    """gpt2fast/optim.py -> training/test_optim.py, below tests/."""
    path = Path(module)
    room = ROOM_OF[path.stem] if path.parts[0] == "gpt2fast" else path.parts[0]
    return f"{room}/test_{path.stem}.py"
