"""`python -m biper` is the command `biper`."""

from biper.commands.main import main

if __name__ == "__main__":
    main()
