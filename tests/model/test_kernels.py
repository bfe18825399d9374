"""The package gpt2fast.kernels: found in ../kernels, never as `kernels`, and what it offers."""

from tests.tools.checkout import CHECKOUT


def test_kernels_is_no_package_of_that_name():
    assert not (CHECKOUT / "kernels" / "__init__.py").exists()


def test_it_offers_functions_and_each_name_of_ops():
    from gpt2fast import kernels, ops

    assert set(ops.NAMES) <= set(kernels.__all__)
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)
