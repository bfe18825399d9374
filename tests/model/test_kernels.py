"""The package gpt2fast.kernels: found in ../kernels, never as `kernels`, and its public names."""

from tests.tools.checkout import CHECKOUT


def test_the_folder_kernels_is_not_a_package():
    assert not (CHECKOUT / "kernels" / "__init__.py").exists()


def test_no_public_name_is_also_a_file():
    """Otherwise gpt2fast.kernels.NAME would be a function or a module, depending on the order of imports."""
    from gpt2fast import kernels

    assert set(kernels.__all__).isdisjoint(path.stem for path in (CHECKOUT / "kernels").glob("*.py"))


def test_public_names_are_callable_and_include_each_op():
    from gpt2fast import kernels, ops

    assert set(ops.NAMES) <= set(kernels.__all__)
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)
