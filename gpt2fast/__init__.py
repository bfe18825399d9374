"""gpt2fast trains GPT-2 fast on one GPU. Start with `python -m gpt2fast.train`, or read model.py."""

__version__ = "0.1.0"
