"""Streams of samples from shards, masking, pairing and collating; numpy only."""
