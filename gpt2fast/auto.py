"""`--backend auto`: of each op the implementation that is fastest on this GPU, at this run's sizes and precision.

    candidates   torch; triton, and of mlp epilogue, where they can be built; compiled, unless the whole step is
    measured     verified and timed, forward + backward (measure.py)
    chosen       the fastest, but torch unless it is beaten by more than NOISE

An op that --ops names is neither measured nor changed. Elsewhere than on CUDA torch is the only candidate, and nothing
is measured. Times are kept in the user's cache directory, by device, sizes, precision, versions and sources.

So the sum over ops is at most that of torch alone or triton alone, within NOISE. In a compiled step each candidate is
compiled by itself, and there the sum is an estimate: torch.compile may fuse an op of torch's with what is around it.
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

NOISE = 0.02  # of a median: who is faster by less is not faster
KEPT = 100  # entries of the cache, the newest

Times = dict[str, dict[str, float]]  # op -> candidate -> milliseconds


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An implementation for every op, and the results of those ops that were measured."""

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
    """Fill what `config` leaves open. measure(op, candidates) times them together; one candidate is not measured."""
    chosen: dict = {}
    results: dict[str, dict[str, Result]] = {}
    for op, given in asdict(config).items():
        if given is None and len(candidates[op]) > 1:
            results[op] = measure(op, candidates[op])
        chosen[op] = given or (fastest(results[op]) if op in results else candidates[op][0])
    return Choice(ops=OpsConfig(**chosen), results=results)


def fastest(results: Mapping[str, Result]) -> str:
    """The least time; torch's if it is not beaten by more than NOISE."""
    times = {name: ms for name, ms in results.items() if not isinstance(ms, str)}
    best = min(times, key=times.__getitem__)
    return best if times[best] < (1 - NOISE) * times["torch"] else "torch"


def pick(config: OpsConfig, work: Workload, device: torch.device, say: Callable[[str], None] = print) -> Choice:
    """Choose by what the cache holds, and measure what it does not; `say` is told what is done and what goes wrong."""
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
                say(f"note: {op}: {name} is not taken: {result}")
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
        torch.cuda.empty_cache()  # the model gets memory in one piece
    return choice


def recall(config: OpsConfig, chosen: Mapping[str, str], device: str) -> OpsConfig | None:
    """Fill what `config` leaves open by an earlier choice; None where that cannot be built, or would be interpreted."""
    earlier: dict = {op: chosen.get(op, "torch") for op, given in asdict(config).items() if given is None}
    filled = replace(config, **earlier)
    try:
        ops.build(filled, device)
    except UserError:
        return None
    return None if ops.interpreted(filled) and not ops.interpreted(config) else filled


def candidates(work: Workload, device: torch.device, say: Callable[[str], None]) -> dict[str, list[str]]:
    """Who may compute each op, torch first."""
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
    """What else times depend on."""
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
    """One line that a person can read."""
    return ", ".join(f"{name} {value}" for name, value in ({**environment, **asdict(work)}).items())


def cache_file() -> Path:
    """RuntimeError where the user has no home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"  # XDG: a relative one is ignored
    return folder / "gpt2fast" / "auto.json"


def load_cache(say: Callable[[str], None]) -> dict[str, Times]:
    """Every entry by its key; empty where there is no file, or none that can be trusted as a whole."""
    try:
        entries = json.loads(cache_file().read_text())
        if fault := _fault(entries):
            raise ValueError(fault)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        say(f"note: {cache_file()} is damaged and is written anew ({describe_error(error)})")
        return {}
    except (OSError, RuntimeError) as error:
        say(f"note: the cache of --backend auto cannot be read ({describe_error(error)}): the ops are measured again")
        return {}
    return entries


def save_cache(entries: dict[str, Times], say: Callable[[str], None]) -> None:
    """The newest KEPT of them. A run goes on without."""
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
    """What is wrong with the cache's content, "" if nothing is."""
    if not isinstance(entries, dict):
        return f"it holds a {type(entries).__name__}"
    for key, measured in entries.items():
        if not isinstance(measured, dict) or not all(isinstance(times, dict) for times in measured.values()):
            return f"no times are under {key!r}"
        for op, times in measured.items():
            for name, ms in times.items():
                if type(ms) not in (int, float) or not 0 < ms < math.inf:
                    return f"{op} takes {name} {ms!r} ms"
    return ""


def _sources() -> list[Path]:
    """The files that times depend on: the kernels, wherever gpt2fast/kernels.py finds them, and what measures them."""
    here = Path(__file__).resolve().parent
    folders = (here / "kernels", here.parent / "kernels")
    kernels = next((sorted(folder.glob("*.py")) for folder in folders if (folder / "registration.py").is_file()), [])
    return [*kernels, *(here / f"{name}.py" for name in ("auto", "measure", "ops", "reference"))]


def _hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
