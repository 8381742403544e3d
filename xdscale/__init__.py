"""xdscale: adapts language encoders with CLIP's visual knowledge, at scale."""

__version__ = "0.1.0"
