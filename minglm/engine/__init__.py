"""Inference: from a prompt to the text that follows it."""
