"""The names and shapes of the tensors in `GPT.state_dict()`, without building a model."""

from gpt2fast.model import SIZES, VOCAB_SIZE, GPTConfig

PADDED_VOCAB_SIZE = 50304  # nanoGPT and build-nanogpt round up to a multiple of 64: the last 47 rows are not tokens
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) in OpenAI's code and in transformers'


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape in the model's order; the vocabulary is not padded."""
    C = config.n_embd
    return {
        "wte.weight": (config.vocab_size, C),
        "wpe.weight": (config.block_size, C),
        **{f"h.{i}.{name}": shape for i in range(config.n_layer) for name, shape in block_shapes(C).items()},
        "ln_f.weight": (C,),
        "ln_f.bias": (C,),
    }


def block_shapes(C: int) -> dict[str, tuple[int, ...]]:
    """Return name within a block -> shape at width C; weights are (out, in)."""
    return {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (4 * C, C),
        "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (C, 4 * C),
        "mlp.c_proj.bias": (C,),
    }


def heads(n_layer: int, n_embd: int) -> int | None:
    """Return the heads of the known size with these layers and this width, else None; no tensor's shape tells them."""
    known = {(size.n_layer, size.n_embd): size.n_head for size in SIZES.values()}
    return known.get((n_layer, n_embd))


def unpadded(vocab_size: int) -> int:
    """Return the number of tokens, if only the number of rows of wte is known."""
    return VOCAB_SIZE if vocab_size == PADDED_VOCAB_SIZE else vocab_size
