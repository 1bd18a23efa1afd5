"""What each idea contributes: python ablation.py RECIPE.yaml --seeds 0 1 2 [--epochs 4 2] [--studies NAME...]."""

from biper.commands.ablation import main

if __name__ == "__main__":
    main()
