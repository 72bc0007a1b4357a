"""Getting a model in: where it lies, what is in it, and its weights block by block."""
