"""compute-sanitizer's verdicts, by a stand-in for it."""

import pytest
import torch

from benchmarks import sanitize
from gpt2fast.errors import UserError


def test_sanitizer_without_a_gpu_or_itself(monkeypatch, tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="benchmarks.sanitize needs a CUDA GPU"):
            sanitize.run(sanitize.SanitizeConfig())
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    assert {row["status"] for row in sanitize.check_all(10.0, tmp_path)} == {"failed"}


@pytest.mark.parametrize(("code", "status"), [(0, "ok"), (9, "failed")])
def test_what_the_sanitizer_says(code, status, monkeypatch, tmp_path):
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(f"#!/bin/sh\necho found $2\nexit {code}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: str(fake))
    rows = sanitize.check_all(10.0, tmp_path)
    assert [(row["tool"], row["status"]) for row in rows] == [("memcheck", status), ("racecheck", status)]
    assert ("found memcheck" in rows[0].get("tail", "")) == (code != 0)
