"""The record of versions and hardware that is kept with every number."""

import json
import subprocess

from gpt2fast.machine import versions
from tests.tools.checkout import CHECKOUT


def test_the_record_is_plain_json_and_has_the_commit():
    record = versions.record()
    assert json.loads(json.dumps(record)) == record
    if (CHECKOUT / ".git").exists():  # a copy in which a mutant is planted has none
        head = subprocess.run(["git", "-C", CHECKOUT, "rev-parse", "HEAD"], capture_output=True, text=True)
        assert record["commit"] == (head.stdout.strip() or None)


def test_a_copy_outside_a_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "gpt2fast" / "machine" / "versions.py"))
    assert versions.record()["commit"] is None


def test_a_package_has_a_version_or_none():
    assert versions.installed("torch")
    assert versions.installed("not-a-package") is None
