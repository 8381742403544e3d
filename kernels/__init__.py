"""Operations of the models, one file each. Kept light: transformers looks for a top-level `kernels` too."""
