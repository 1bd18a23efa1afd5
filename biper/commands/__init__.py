"""The commands, a file each: `build_parser` says what a user may ask for, `main` does it and says how it ended."""
