"""What tables are made of. A source is one class (see `xdscale.shards.build.Source`)."""
