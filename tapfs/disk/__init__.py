"""One virtual disk: a chain of layers, its map, its engine, its writes."""
