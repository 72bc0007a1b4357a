"""Pure tensor mathematics: no model, no file, no terminal."""
