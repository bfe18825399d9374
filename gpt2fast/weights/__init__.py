"""Tensors on disk, our own and other projects', and the model made of them."""
