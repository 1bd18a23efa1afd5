"""Stage 1 on ImageNet: real weights sin(freq*w), binary activations."""

from biper.commands.train import main

if __name__ == "__main__":
    main(family="imagenet", stage=1)
