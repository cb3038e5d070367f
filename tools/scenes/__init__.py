"""Simple scenes: what a small text-to-image model is trained on, and what its pictures are checked against."""
