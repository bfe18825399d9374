"""Read and write files safely: atomic, size-limited, checked, downloaded."""
