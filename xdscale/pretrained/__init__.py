"""From names in a recipe to encoders: architectures, local folders and hub names; random or stored weights.

Nothing here needs a network unless the recipe asks for weights that are not on this machine.
"""
