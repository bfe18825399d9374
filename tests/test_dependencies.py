"""Each dependency has a reason, a measured row and a version known to work, within what pyproject.toml allows."""

import json
import re

import pytest
from conftest import CHECKOUT

pytest.importorskip("packaging")
from packaging.version import Version

from benchmarks import dependencies
from gpt2fast.errors import UserError

LINES = (CHECKOUT / "constraints.txt").read_text().splitlines()
VERSIONS = dict(line.split("==") for line in LINES if not line.startswith("#"))
LOCKED = {name: wanted for name, (wanted, extras) in dependencies.declared().items() if not extras or "test" in extras}


def test_constraints_are_names_and_exact_versions_and_nothing_else():
    plain = re.compile(r"[a-z0-9-]+==[0-9][0-9a-z.]*")  # no address, no path, no marker
    assert [line for line in LINES if not (line.startswith("# ") or plain.fullmatch(line))] == []
    assert sorted(VERSIONS) == list(VERSIONS)


@pytest.mark.parametrize("name", LOCKED)
def test_every_requirement_has_a_constraint_within_its_range(name):
    assert Version(VERSIONS[name]) in LOCKED[name].specifier


def test_what_they_need_is_constrained_too():
    """As far as it is installed here, in the version that is constrained: another one may need something else."""
    judged = dependencies.closure(list(LOCKED)) - {line.split()[0] for line in dependencies.changed()}
    needed = {name for package in judged for name, _ in dependencies.needs(package) if dependencies.installed(name)}
    assert needed <= set(VERSIONS)


def test_every_dependency_has_a_reason_and_none_is_left_over():
    assert dependencies.declared().keys() == dependencies.REASONS.keys()


def test_a_dependency_without_a_reason_is_refused(monkeypatch):
    monkeypatch.delitem(dependencies.REASONS, "tqdm")
    with pytest.raises(UserError, match="tqdm in pyproject"):
        dependencies.main(["--constraints"])


def test_every_package_that_everybody_installs_is_measured():
    path = CHECKOUT / "benchmarks" / "results" / "dependencies.jsonl"
    rows = {row["name"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert {name for name, (_, extras) in dependencies.declared().items() if not extras} <= rows.keys()
    assert all(row["megabytes"] > 0 for row in rows.values())


def test_what_is_saved_is_the_package_and_what_nobody_else_needs(monkeypatch):
    needed = {"a": ["b", "c"], "b": [], "c": ["d"], "d": ["c"], "e": ["b"]}
    monkeypatch.setattr(dependencies, "installed", lambda name: needed.get(name) is not None)
    monkeypatch.setattr(dependencies, "needs", lambda name, extras=(): [(other, ()) for other in needed[name]])
    assert dependencies.closure(["a", "e"]) == set("abcde")
    assert dependencies.closure(["e", "missing"]) == set("be")
    monkeypatch.setattr(dependencies, "size", lambda name: {"a": 1, "b": 10, "c": 100, "d": 1000, "e": 10000}[name])
    assert dependencies.saved("a", ["a", "e"]) == 1101  # b is needed by e too
    assert dependencies.saved("a", ["a", "c"]) == 11


def test_a_package_of_another_version_is_named(tmp_path, monkeypatch):
    here = [f"{name}=={version}" for name, version in VERSIONS.items()]
    monkeypatch.setattr(dependencies, "constraints", lambda: here)
    assert dependencies.changed() == []
    here[0] = here[0].partition("==")[0] + "==0.0.1"
    name = next(iter(VERSIONS))
    assert dependencies.changed() == [f"{name} {VERSIONS[name]} -> 0.0.1"]
