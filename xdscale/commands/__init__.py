"""Commands that no other part has, one file each; `xdscale.cli` mounts them."""
