"""Parameters, bytes and operations of a network: python summary.py MODEL|CHECKPOINT."""

from biper.commands.cli import summary_main

if __name__ == "__main__":
    summary_main()
