"""Kernels timed by hand, with pytest-benchmark."""

import pytest

from tests.tools.checkout import CHECKOUT

pytest.importorskip("pytest_benchmark", reason="times them")


def test_kernels_are_timed_by_one_command(fresh_python):
    quick = ["-k", "layer_norm or gelu-forward", "--benchmark-max-time", "0.01", "-p", "no:cacheprovider"]
    done = fresh_python("-m", "pytest", "benchmarks", "--benchmark-only", *quick, cwd=CHECKOUT)
    assert done.returncode == 0, done.stdout
    for name in ("gelu-forward", "layer_norm-forward", "add_layer_norm-both"):
        assert f"bench_kernel[eager-{name}]" in done.stdout
    assert "6 passed, 6 skipped" in done.stdout or "12 passed" in done.stdout
