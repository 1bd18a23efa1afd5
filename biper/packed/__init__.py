"""Networks of one bit a weight: packed, saved, loaded and run."""
