"""Where samples come from: reading texts, tokenizing, packing.

`source` opens what the user named and streams its texts, `samples` chooses the rows that the passes measure, `windows`
cuts a text for evaluation.
"""
