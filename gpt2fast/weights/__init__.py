"""Read and write tensors on disk, ours and other projects', and build models from them."""
