"""Where samples come from: reading texts, tokenizing, packing."""
