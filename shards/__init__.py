"""Text corpora to tar shards: reading, packing, writing, verifying, and reading back by sample number."""
