"""Download CIFAR-10 or CIFAR-100, or unpack a local archive of it."""

from biper.commands.cli import download_main

if __name__ == "__main__":
    download_main()
