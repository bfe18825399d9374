"""What a step multiplies and moves, ideally and as we compute it."""

import dataclasses

import pytest

from benchmarks import step_parts
from benchmarks.step_parts import ALL, Options, parts
from gpt2fast.kernels import launch
from gpt2fast.model import SIZES

SHAPE = SIZES["gpt2"], 64, 1024
NONE = Options()


def by_name(*shape, **changes):
    return {part.name: part for part in parts(*shape, **changes)}


def test_recomputing_costs_a_forward_pass_of_the_blocks():
    plain, again = by_name(*SHAPE), by_name(*SHAPE, ours=dataclasses.replace(ALL, recompute=True))
    for name in ("qkv", "fc", "mlp projection", "attention projection"):
        assert again[name].our_flops == pytest.approx(plain[name].our_flops * 4 / 3)
    assert again["attention forward"].our_flops == 2 * plain["attention forward"].our_flops
    assert again["head"] == plain["head"]
    assert [part.flops for part in again.values()] == [part.flops for part in plain.values()]  # ideal


def test_no_part_of_ours_multiplies_less_than_an_ideal_step():
    assert all(part.our_flops >= part.flops for options in (ALL, NONE) for part in parts(*SHAPE, options))


@pytest.mark.parametrize(("one_pass", "products"), [(True, 5), (False, 7)])
def test_attention_multiplies_whole_tiles_on_the_diagonal(one_pass, products):
    ours = dataclasses.replace(ALL, one_pass=one_pass)
    for B, T in ((64, 1024), (4, 16384)):
        backward = by_name(SIZES["gpt2"], B, T, ours=ours)["attention backward"]
        assert backward.our_flops / backward.flops == pytest.approx(products / 5 * (1 + 128 / T))


def test_what_is_copied_from_the_kernels_settings_is_what_they_say():
    assert (step_parts.HEAD_BYTES, step_parts.HEAD_SHARE) == (launch.HEAD_BYTES, launch.HEAD_SHARE)


def test_a_small_device_sums_the_heads_gradient_over_chunks():
    name = "head's dw summed over chunks"
    assert by_name(*SHAPE, memory=24e9)[name].our_bytes > 5 * by_name(*SHAPE, memory=150e9)[name].our_bytes


@pytest.mark.parametrize(
    ("name", "gb"),
    [("add + LayerNorm forward", 9.66), ("LayerNorm backward", 10.07), ("cross-entropy", 13.19), ("embedding", 0.81),
     ("attention's delta", 2.42), ("AdamW", 3.73), ("gradient norm", 0.50)],
)  # fmt: skip
def test_what_must_be_moved(name, gb):
    assert by_name(*SHAPE)[name].bytes == pytest.approx(gb * 1e9, abs=6e6)
