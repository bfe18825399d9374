"""Measurements. Run from the checkout: `python -m benchmarks.ladder`, `python -m benchmarks.gpu --out DIR`."""
