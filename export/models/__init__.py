"""Next-scale models, written for export: stateless step functions over official checkpoints."""
