"""Unpack the archives of ImageNet (ILSVRC 2012) into class folders."""

from biper.commands.prepare import main

if __name__ == "__main__":
    main()
