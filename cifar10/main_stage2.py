"""Stage 2 on CIFAR-10: stage 1's network with binary weights, the signs of sin(freq*w)."""

from biper.commands.train import main

if __name__ == "__main__":
    main(family="cifar10", stage=2)
