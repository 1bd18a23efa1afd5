"""Stage 1 on CIFAR-10: real weights sin(freq*w), binary activations."""

from biper.commands.train import main

if __name__ == "__main__":
    main(family="cifar10", stage=1)
