"""Published sets of training objectives, one file each."""
