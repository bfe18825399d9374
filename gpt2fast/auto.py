"""`--backend auto`: the implementation of each op that is fastest on this GPU, at this run's sizes and precision.

    candidates   torch; triton, and for mlp epilogue, where they can be built; compiled, unless the whole step is
    measured     verified and timed, forward + backward (measure.py)
    chosen       the fastest, but torch unless another is faster by more than NOISE

An op that --ops names is neither measured nor changed. On devices other than CUDA torch is the only candidate, and
nothing is measured. Times are kept in the user's cache directory, by device, sizes, precision, versions and sources.

So the sum over ops is at most that of torch alone or triton alone, within NOISE. In a compiled step each candidate is
compiled by itself, and the sum is an estimate: torch.compile may fuse a torch op with its neighbours.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from gpt2fast import __version__, ops
from gpt2fast.errors import UserError, describe_error
from gpt2fast.files.atomic import write_atomic
from gpt2fast.machine.device import device_name
from gpt2fast.machine.versions import installed
from gpt2fast.measure import Result, Workload, measure_op
from gpt2fast.ops import NAMES, OpsConfig

NOISE = 0.02  # relative, of a median: smaller differences do not count
KEPT = 100  # entries that the cache keeps, the newest ones

Times = dict[str, dict[str, float]]  # op -> candidate -> milliseconds


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An implementation for every op, and the results of the ops that were measured."""

    ops: OpsConfig
    results: dict[str, dict[str, Result]]


def to_json(choice: Choice | None) -> str:
    return json.dumps(choice and asdict(choice))


def from_json(text: str) -> Choice:
    values = json.loads(text)
    return Choice(ops=OpsConfig(**values["ops"]), results=values["results"])


def choose(
    config: OpsConfig,
    candidates: Mapping[str, Sequence[str]],
    measure: Callable[[str, Sequence[str]], dict[str, Result]],
) -> Choice:
    """Choose an implementation for each op that is None in `config`.

    measure(op, candidates) times all of an op's candidates together; an op with one candidate is not measured.
    """
    chosen: dict = {}
    results: dict[str, dict[str, Result]] = {}
    for op, given in asdict(config).items():
        if given is None and len(candidates[op]) > 1:
            results[op] = measure(op, candidates[op])
        chosen[op] = given or (fastest(results[op]) if op in results else candidates[op][0])
    return Choice(ops=OpsConfig(**chosen), results=results)


def fastest(results: Mapping[str, Result]) -> str:
    """Return the fastest implementation, or torch unless another is faster by more than NOISE."""
    times = {name: ms for name, ms in results.items() if not isinstance(ms, str)}
    best = min(times, key=times.__getitem__)
    return best if times[best] < (1 - NOISE) * times["torch"] else "torch"


def pick(config: OpsConfig, work: Workload, device: torch.device, say: Callable[[str], None] = print) -> Choice:
    """Choose by cached times, and measure what is not cached; `say` receives progress and warnings."""
    found = candidates(work, device, say)
    several = any(given is None and len(found[op]) > 1 for op, given in asdict(config).items())
    key, cache = (cache_key(work, environment(device)), load_cache(say)) if several else ("", {})
    known = cache.get(key, {})
    new: dict[str, dict[str, Result]] = {}

    def measure(op: str, names: Sequence[str]) -> dict[str, Result]:
        if set(names) <= set(known.get(op, ())):
            return {name: known[op][name] for name in names}
        if not new:
            say("measuring the ops' implementations, once for this device and these sizes ...")
        new[op] = measure_op(op, names, work, device)
        for name, result in new[op].items():
            if isinstance(result, str):
                say(f"note: {op}: {name} is not used: {result}")
        return new[op]

    choice = choose(config, found, measure)
    whole: Times = {}
    for op, results in new.items():
        times = {name: ms for name, ms in results.items() if not isinstance(ms, str)}
        whole |= {op: times} if len(times) == len(results) else {}
    if whole:  # a candidate that failed is tried again next time
        cache.pop(key, None)
        save_cache(cache | {key: known | whole}, say)
    if new and device.type == "cuda":
        torch.cuda.empty_cache()  # so that the model gets contiguous memory
    return choice


def recall(config: OpsConfig, chosen: Mapping[str, str], device: str) -> OpsConfig | None:
    """Fill the ops that are None in `config` from an earlier choice.

    None if the result cannot be built here, or if the earlier choice would run in Triton's interpreter.
    """
    earlier: dict = {op: chosen.get(op, "torch") for op, given in asdict(config).items() if given is None}
    filled = replace(config, **earlier)
    try:
        ops.build(filled, device)
    except UserError:
        return None
    return None if ops.interpreted(filled) and not ops.interpreted(config) else filled


def candidates(work: Workload, device: torch.device, say: Callable[[str], None]) -> dict[str, list[str]]:
    """Return the implementations that can compute each op, torch first."""
    found: dict[str, list[str]] = {op: ["torch"] for op in NAMES}
    if device.type != "cuda":
        return found
    faults = []
    for op, names in found.items():
        names += [] if work.compiled else ["compiled"]
        for name in ("triton", "epilogue") if op == "mlp" else ("triton",):
            ours = OpsConfig(**{op: name})  # type: ignore[arg-type]  # names are Implementations
            try:
                ops.build(ours, device.type)
                ops.check_sizes(ours, work.C, work.C // work.H)
            except UserError as error:
                faults.append(str(error))
            else:
                names += [] if ops.interpreted(ours) else [name]
    for fault in dict.fromkeys(faults):
        say(f"note: triton is not measured: {fault}")
    return found


def environment(device: torch.device) -> dict[str, str]:
    """Return what times depend on beside the workload."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else ()
    return {
        "device": device_name(device),
        "capability": ".".join(map(str, capability)),
        "torch": torch.__version__,
        "triton": installed("triton") or "none",
        "gpt2fast": __version__,
        "sources": _hash(_sources()),
    }


def cache_key(work: Workload, environment: Mapping[str, str]) -> str:
    """Return the key of the cache's entry, one readable line."""
    return ", ".join(f"{name} {value}" for name, value in ({**environment, **asdict(work)}).items())


def cache_file() -> Path:
    """Return the path of the cache. RuntimeError if the user has no home directory."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"  # XDG: a relative one is ignored
    return folder / "gpt2fast" / "auto.json"


def load_cache(say: Callable[[str], None]) -> dict[str, Times]:
    """Return every entry by its key; none if there is no file, or if any part of it is damaged."""
    try:
        entries = json.loads(cache_file().read_text())
        if fault := _fault(entries):
            raise ValueError(fault)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        say(f"note: {cache_file()} is damaged and will be replaced ({describe_error(error)})")
        return {}
    except (OSError, RuntimeError) as error:
        say(f"note: the cache of --backend auto cannot be read ({describe_error(error)}): the ops are measured again")
        return {}
    return entries


def save_cache(entries: dict[str, Times], say: Callable[[str], None]) -> None:
    """Write the newest KEPT entries. A file that cannot be written is a warning and does not end the run."""
    newest = dict(list(entries.items())[-KEPT:])
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(newest, indent=1) + "\n")
    except (OSError, RuntimeError) as error:
        say(
            f"note: the cache of --backend auto cannot be written ({describe_error(error)}): "
            "the next run measures again"
        )


def _fault(entries: object) -> str:
    """Return what is wrong with the cache's content, "" if nothing is."""
    if not isinstance(entries, dict):
        return f"it contains a {type(entries).__name__}, not a dict"
    for key, measured in entries.items():
        if not isinstance(measured, dict) or not all(isinstance(times, dict) for times in measured.values()):
            return f"{key!r} has no times"
        for op, times in measured.items():
            for name, ms in times.items():
                if type(ms) not in (int, float) or not 0 < ms < math.inf:
                    return f"the time of {name} for {op} is {ms!r} ms"
    return ""


def _sources() -> list[Path]:
    """Return the files that times depend on: the kernels, where gpt2fast/kernels.py finds them, and this module's."""
    here = Path(__file__).resolve().parent
    folders = (here / "kernels", here.parent / "kernels")
    kernels = next((sorted(folder.glob("*.py")) for folder in folders if (folder / "registration.py").is_file()), [])
    return [*kernels, *(here / f"{name}.py" for name in ("auto", "measure", "ops", "reference"))]


def _hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
