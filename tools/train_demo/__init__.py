"""Training of the demo model: VAR's multi-scale VQVAE and transformer at a small width, on eight photographs."""
