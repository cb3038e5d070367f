"""HART: text to image, tokens from a code book and a diffusion of what they leave out."""
