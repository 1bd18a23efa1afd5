"""Quantization error of checkpoints: python compute_QE.py CHECKPOINT... [--plot FILE.png] [--csv FILE]."""

from biper.commands.cli import quantization_error_main

if __name__ == "__main__":
    quantization_error_main()
