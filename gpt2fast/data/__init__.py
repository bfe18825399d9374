"""From text to tokens, to shards, to batches."""
