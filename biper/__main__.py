"""`python -m biper -e CHECKPOINT`: evaluate a checkpoint of any family."""

from biper.commands.train import main

if __name__ == "__main__":
    main()
