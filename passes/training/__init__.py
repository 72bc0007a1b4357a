"""Learning: losses, the order of the data, the loop, and what survives a kill. Imported when a pass runs."""
