"""Quantization error of checkpoints: python compute_QE.py CHECKPOINT... [--plot FILE.png] [--csv FILE]."""

from biper.commands.quantization_error import main

if __name__ == "__main__":
    main()
