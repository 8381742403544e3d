"""The order of samples, masking, pairing and collating; numpy only."""
