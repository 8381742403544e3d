"""Image regions as a source: from the files of published features, or made by a network. One file per family."""
