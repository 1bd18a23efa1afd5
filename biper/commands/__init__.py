"""From argv to what a command does, and how it ends."""
