"""Stage 2 on ImageNet: binary weights, starting from stage 1."""

from biper.commands.train import main

if __name__ == "__main__":
    main(family="imagenet", stage=2)
