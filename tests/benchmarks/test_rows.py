"""The rows that count."""

import json

import pytest

from gpt2fast.errors import UserError
from tests.tools.rows import peer, tables, write


def test_the_newest_file_of_a_configuration_counts(tmp_path):
    write(tmp_path, "cpu", "2026-11-20_bbbbbbb_peers.jsonl", peer("textbook eager", 111))
    write(tmp_path, "cpu", "2026-11-21_aaaaaaa_peers.jsonl", peer("textbook eager", 222))
    other = {"size": "gpt2", "B": 4, "T": 256, "precision": "bf16", "device": "cpu"}
    write(tmp_path, "cpu", "2026-11-19_ccccccc_peers.jsonl", peer("textbook eager", 333, config=other))
    table = tables(tmp_path)["peers"]
    assert "111" not in table
    assert "222" in table
    assert "333" in table


def test_a_row_that_was_cut_off_is_named(tmp_path):
    write(tmp_path, "cpu", "2026-11-21_aaaaaaa_peers.jsonl", peer("textbook eager", 1))
    path = tmp_path / "cpu" / "2026-11-21_aaaaaaa_peers.jsonl"
    path.write_text(path.read_text() + json.dumps(peer("torch eager", 2))[:30])
    with pytest.raises(UserError, match="line 2"):
        tables(tmp_path)
