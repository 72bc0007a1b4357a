"""Tasks, gates and speed: what an artifact is worth, in its own runtime."""
