"""Parity, perplexity, benchmark."""
