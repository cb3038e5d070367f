"""Training of the text-to-image demo: Infinity's VAE, a T5 encoder and Infinity's transformer, all small, on scenes."""
