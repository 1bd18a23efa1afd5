"""Data sets, and the loaders that bring their images to the device."""
