"""Drawn pictures whose content is known, written in the public formats of vision-language benchmarks.

Two things of different kinds and colours, big or small, lie on two kinds of ground. Captions, questions, statements
and expressions follow from that, so an answer is right or wrong by construction. Every question, statement and
hypothesis has each of its answers equally often: who reads the text alone stays at chance. See docs/picture-world.md.
"""
