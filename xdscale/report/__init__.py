"""The paper's tables from finetuning sweeps: medians, spreads, significance, published values beside ours."""
