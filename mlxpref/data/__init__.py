"""From any data set to arrays: sources, relabelling, tokenization, batching."""
