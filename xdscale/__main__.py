"""`python -m xdscale`: the `xdscale` command."""

from xdscale.cli import main

main()
