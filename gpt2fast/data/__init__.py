"""Turn text into tokens, tokens into shards, and shards into batches."""
