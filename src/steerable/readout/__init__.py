"""What vectors say in tokens, layer by layer, and how they lie to one another: `steerable lens`."""
