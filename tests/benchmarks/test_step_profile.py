"""A step's device time by group of kernels."""

import pytest

from benchmarks import step_profile


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("triton_red_fused__to_copy_add_native_layer_norm_0", "layer norm"),
        ("void at::native::(anonymous namespace)::cuComputePartGradGammaBeta", "layer norm"),
        ("triton_poi_fused_gelu_gelu_backward_3", "gelu"),
        ("void cunn_SoftMaxBackward<4, float, float>", "cross-entropy"),
        ("triton_red_fused__log_softmax_nll_loss_forward_1", "cross-entropy"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::embedding_backward_feature_kernel", "embedding"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("triton_poi_fused_add_7", "elementwise"),
        ("aten::baddbmm_", "matmul"),
        ("aten::dot", "optimizer"),
        ("gpt2fast_cpu::attention_bwd", "attention"),
        ("gpt2fast_cpu::linear_cross_entropy", "cross-entropy"),
        ("something_new", "other"),
    ],
)
def test_kernels_fall_into_groups(kernel, group):
    assert step_profile.group_of(kernel) == group


def test_the_longest_kernels_are_listed():
    row = step_profile.by_group({"gemm_a": 2.0, "gemm_b": 3.0, "x": 1.0}, top=2)
    assert row == {
        "device_ms": 6.0,
        "groups": {"matmul": 5.0, "other": 1.0},
        "kernels": [["gemm_b", 3.0], ["gemm_a", 2.0]],
    }
