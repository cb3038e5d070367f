"""Infinity: text to image, tokens of bits."""
