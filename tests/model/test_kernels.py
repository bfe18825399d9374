"""The package gpt2fast.kernels: found in ../kernels, never as `kernels`, and what it offers."""

from tests.tools.checkout import CHECKOUT


def test_kernels_is_no_package_of_that_name():
    assert not (CHECKOUT / "kernels" / "__init__.py").exists()


def test_no_public_name_is_also_a_file():
    """Else gpt2fast.kernels.NAME would be a function or a module, by the order of imports."""
    from gpt2fast import kernels

    assert set(kernels.__all__).isdisjoint(path.stem for path in (CHECKOUT / "kernels").glob("*.py"))


def test_it_offers_functions_and_each_name_of_ops():
    from gpt2fast import kernels, ops

    assert set(ops.NAMES) <= set(kernels.__all__)
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)
