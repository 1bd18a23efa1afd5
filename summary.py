"""Parameters, bytes and operations of a network: python summary.py MODEL|CHECKPOINT."""

from biper.commands.summary import main

if __name__ == "__main__":
    main()
