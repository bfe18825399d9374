"""Text out of a model: the window, the seed, the likeliest token, the command line."""

import pytest
import tiny
import torch

from gpt2fast import sample
from gpt2fast.errors import UserError
from gpt2fast.model import GPT
from gpt2fast.ops import OpsConfig, build
from gpt2fast.train import train


@pytest.fixture(scope="module")
def model():
    model = GPT(tiny.MODEL, build(OpsConfig()))
    with torch.no_grad():
        model.wte.weight.mul_(20)  # an untrained model is so unsure that every seed gives another text anyway
    return model


IDX = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_greedy_takes_the_likeliest_token_each_time(model):
    out = sample.generate(model, IDX, 4, temperature=0)
    for n in range(3, 7):
        assert torch.equal(out[:, n], model(out[:, :n])[:, -1].argmax(-1))


def test_text_may_be_longer_than_the_block(model):
    out = sample.generate(model, IDX, 40, temperature=0)
    assert out.shape == (2, 43)
    assert torch.equal(out[:, -1], model(out[:, -17:-1])[:, -1].argmax(-1))


def test_the_seed_decides(model):
    def draw(seed):
        return sample.generate(model, IDX, 20, temperature=2.0, generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(1)
    first = draw(0)
    torch.manual_seed(2)
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))


def test_sampling_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    sample.generate(model, IDX, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_top_k_limits_the_choice(model):
    best = model(IDX[:1])[0, -1].topk(3).indices.tolist()
    drawn = sample.generate(model, IDX[:1].expand(300, -1), 1, temperature=5.0, top_k=3)[:, -1].tolist()
    assert set(drawn) == set(best)
    assert len(set(sample.generate(model, IDX[:1].expand(300, -1), 1, temperature=50.0, top_k=0)[:, -1].tolist())) > 100


def test_no_token_of_the_padding_is_ever_drawn(model):
    drawn = sample.generate(model, IDX[:1].expand(2000, -1), 1, temperature=1000.0, top_k=0)[:, -1]
    assert drawn.max() < 50257


def test_command_line(tmp_path, run_module, capsys):
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    c = tiny.config(tmp_path, steps=3, warmup=1, run="a")
    train(c)
    texts = [
        run_module(
            "gpt2fast.sample", c.folder, "--prompt", "Hello", "--tokens", "5", "--device", "cpu", check=True
        ).stdout
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert "step_00000003 on cpu" in texts[0]
    assert "\nHello" in texts[0]


def test_what_cannot_be_sampled_is_refused(tmp_path):
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    with pytest.raises(UserError, match="holds no run"):
        sample.main([str(tmp_path)])
    with pytest.raises(UserError, match="--tokens is 0: it must be at least 1"):
        sample.main([str(tmp_path), "--tokens", "0"])
