"""The arithmetic that a token costs, and the device's peak it is compared with.

    FLOPs per token, forward and backward = 6 N + 12 L C T          (PaLM, arXiv:2204.02311, appendix B)

with N parameters (the tied head once, embeddings included, padding excluded), L layers of width C, and T positions:
859.9 MFLOP for GPT-2 124M at T = 1024. Attention is counted in full, although the masked half is not computed, as in
nanoGPT and llm.c, so that figures can be compared.
"""

from gpt2fast.model import GPTConfig

# Dense peaks in TFLOP/s from the vendor's data sheets (H200 and H100: half of the figures "with sparsity"), by the
# name that the driver reports. Exact names only: one chip is sold with several clocks and memories, and a guess would
# give a wrong figure. A device that is not listed has MFU "unknown".
_HOPPER_SXM = {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9}
_AMPERE = {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "NVIDIA H200": _HOPPER_SXM,
    "NVIDIA H100 80GB HBM3": _HOPPER_SXM,
    "NVIDIA H100 PCIe": {"bf16": 756.0, "fp16": 756.0, "tf32": 378.0, "fp32": 51.0},
    "NVIDIA A100-SXM4-40GB": _AMPERE,
    "NVIDIA A100-SXM4-80GB": _AMPERE,
    "NVIDIA A100-PCIE-40GB": _AMPERE,
    "NVIDIA A100 80GB PCIe": _AMPERE,
    "NVIDIA L40S": {"bf16": 362.0, "fp16": 362.0, "tf32": 183.0, "fp32": 91.6},
    "NVIDIA L4": {"bf16": 121.0, "fp16": 121.0, "tf32": 60.0, "fp32": 30.3},
    "NVIDIA GeForce RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},
    "NVIDIA GeForce RTX 3090": {"bf16": 71.0, "fp16": 71.0, "tf32": 35.6, "fp32": 35.6},
}


def parameters(config: GPTConfig) -> int:
    """Return N from the shape alone: 12 C^2 + 13 C in a block, two embeddings, the final LayerNorm."""
    L, C = config.n_layer, config.n_embd
    return L * (12 * C * C + 13 * C) + (config.vocab_size + config.block_size) * C + 2 * C


def flops_per_token(config: GPTConfig, T: int) -> int:
    """Return the FLOPs of a token, forward and backward."""
    return 6 * parameters(config) + 12 * config.n_layer * config.n_embd * T


def peak_flops(device_name: str, precision: str, tf32: bool = False) -> float | None:
    """Return the peak FLOP/s of the matmuls; None if the device is not in the table."""
    unit = "tf32" if precision == "fp32" and tf32 else precision
    peak = PEAK_TFLOPS.get(device_name, {}).get(unit)
    return None if peak is None else peak * 1e12


def mfu(tokens_per_second: float, config: GPTConfig, T: int, peak: float | None) -> float | None:
    """Return the model FLOPs utilisation, 0 to 1; None if the peak is unknown."""
    return None if peak is None else tokens_per_second * flops_per_token(config, T) / peak
