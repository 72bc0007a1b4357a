"""The command line: one file per command, and render.py, the only file that draws on the terminal."""
