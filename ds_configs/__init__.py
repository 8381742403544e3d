"""The DeepSpeed configurations that ship, found by name: `--deepspeed_config electra-large-zero2`."""
