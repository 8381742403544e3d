"""Tables in tar shards: built from sources, verified, fetched from a URL, and read back by row number."""
