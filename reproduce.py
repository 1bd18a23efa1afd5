"""A recipe over seeds: python reproduce.py RECIPE.yaml --seeds 0 1 2 [--epochs_scale 0.1]."""

from biper.commands.reproduce import main

if __name__ == "__main__":
    main()
