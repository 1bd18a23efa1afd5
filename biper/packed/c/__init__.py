"""A packed network as C99: a folder that any compiler takes, for processors without an operating system."""
