"""A campaign against everything that biper reads: `python -m tests.fuzz --cases 1000 --seed 0`.

Each case spoils a file, bytes or what they say, and reads it as the commands do. It has to be read, or refused by a
UsageError: within a bound of time and memory, without another exception, and without a warning.
"""
