"""Rewrites of graphs, one a file: each says what it needs, what it guarantees, and whether it changed anything."""
