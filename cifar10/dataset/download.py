"""Download CIFAR-10 or CIFAR-100, or unpack a local archive of it."""

from biper.commands.download import main

if __name__ == "__main__":
    main()
