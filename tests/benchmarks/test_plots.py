"""A picture carries the fingerprint of the rows it was drawn from, and says what was not measured."""

import pytest

from benchmarks import plots
from benchmarks.rows import groups
from tests.tools.rows import peer, rung, write


def test_a_picture_carries_the_fingerprint_of_its_rows_and_name(tmp_path):
    write(tmp_path, "cpu", "2026-11-21_aaaaaaa_peers.jsonl", peer("torch eager", 10))
    path, found = tmp_path / "peers.png", groups(tmp_path, "peers")
    assert plots.fingerprint_in(path) is None
    path.write_bytes(plots.png("peers", found))
    assert plots.fingerprint_in(path) == plots.fingerprint("peers", found)
    assert plots.fingerprint("ladder", found) != plots.fingerprint("peers", found)
    write(tmp_path, "cpu", "2026-11-21_aaaaaaa_peers.jsonl", peer("torch eager", 11, repetition=1))
    assert plots.fingerprint("peers", groups(tmp_path, "peers")) != plots.fingerprint("peers", found)


def test_another_source_with_the_same_rows_makes_no_picture_stale(tmp_path, monkeypatch):
    write(tmp_path, "cpu", "2026-11-21_aaaaaaa_peers.jsonl", peer("torch eager", 10))
    before = plots.fingerprint("peers", groups(tmp_path, "peers"))
    monkeypatch.setattr(plots, "__file__", str(tmp_path / "nothing.py"))
    monkeypatch.setattr(plots, "OURS", "#000000")
    monkeypatch.setitem(plots.TITLES, "peers", "another title")
    assert plots.fingerprint("peers", groups(tmp_path, "peers")) == before


@pytest.mark.parametrize("name", plots.TITLES)
def test_unmeasured_is_drawn_as_unmeasured(name, tmp_path):
    words = [text.get_text() for axes in plots.draw(name, groups(tmp_path, name)).axes for text in axes.texts]
    assert words == [f"Not measured on a {kind} yet: no row exists." for kind in ("GPU", "CPU")]


def test_a_bar_shows_speed_and_ratio_or_the_reason_why_there_is_none(tmp_path):
    failed = rung("triton", 1, status="failed", tail="out of memory")
    write(tmp_path, "cpu", "2026-11-21_aaaaaaa_ladder.jsonl", rung("fp32", 100), rung("compile", 250), failed)
    panel, _ = plots.draw("ladder", groups(tmp_path, "ladder")).axes
    assert [text.get_text() for text in panel.texts] == ["100   1.00 x", "250   2.50 x", "failed: out of memory"]
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "fp32, eager",
        "+ torch.compile",
        "+ our kernels",
    ]
    assert sorted(bar.get_width() for bar in panel.patches) == [100, 250]
