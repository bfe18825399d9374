"""The recorded step of decoding, on CUDA a graph, generates the same tokens."""

from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from gpt2fast.inference import decode
from gpt2fast.inference.decode import Decoder, Sampling
from gpt2fast.model import GPT
from tests.tools.decoding import GREEDY, PROMPTS, ending, make


@pytest.fixture(scope="module")
def model() -> GPT:
    return make()


def traced(decoders: list[Decoder]):
    """Return a replacement of record_graph that traces the operators of the work, as a CUDA graph records kernels.

    Numbers from the host are constants in the trace. As on a GPU, recording changes no tensor.
    """

    def record(work, other=None):
        (decoder,) = decoders
        places = [decoder.tokens, decoder.length, decoder.ended, decoder.cache.k, decoder.cache.v]
        before = [place.clone() for place in places]
        program = make_fx(lambda nothing: work())(torch.zeros(()))
        for place, value in zip(places, before):
            place.copy_(value)

        def replay():
            with torch.no_grad():
                program(torch.zeros(()))

        return SimpleNamespace(replay=replay)

    return record


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=9, top_p=0.8)], ids=["greedy", "drawn"])
def test_a_recorded_step_generates_the_same_tokens(sampling, precision, model, monkeypatch):
    """It reads all that changes from the device. Beyond the block's end it is not used."""
    made, replays = [], []
    record = traced(made)

    def counted(work, other=None):
        recorded = record(work, other)
        return SimpleNamespace(replay=lambda: replays.append(1) or recorded.replay())

    monkeypatch.setattr(decode, "record_graph", counted)
    settings = {"seeds": range(4), "precision": precision, "stop": ending(model, 17)[1]}
    want = torch.cat(list(Decoder(model, PROMPTS, 30, sampling, **settings).stream()), 1)
    assert not replays
    made.append(Decoder(model, PROMPTS, 30, sampling, **settings))
    made[0].recorded = True
    assert torch.equal(torch.cat(list(made[0].stream()), 1), want)
    assert len(replays) == 24 - 7 - decode.WARM


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_on_a_gpu_the_step_is_recorded_and_generates_the_same_tokens(backend, precision, device):
    drawn = Sampling(temperature=1.0, top_k=20, top_p=0.9)
    model = make(backend=backend, device=device)
    for sampling in (GREEDY, drawn):
        texts = []
        for recorded in (True, False):
            decoder = Decoder(model, PROMPTS, 30, sampling, seeds=range(4), precision=precision, stop=None)
            assert decoder.recorded
            decoder.recorded = recorded
            texts.append(torch.cat(list(decoder.stream()), 1))
            assert (decoder._graph is not None) == recorded
        assert torch.equal(*texts)
