"""Unpack the archives of ImageNet (ILSVRC 2012) into class folders."""

from biper.commands.cli import prepare_main

if __name__ == "__main__":
    prepare_main()
