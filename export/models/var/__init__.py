"""VAR: class-conditional, tokens from a code book."""
