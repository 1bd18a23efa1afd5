"""Networks of one bit: packed, saved, loaded and run. `pack`, `save` and `load` are what is needed."""

from biper.deploy.file import load, save
from biper.deploy.layers import PackedConv2d
from biper.deploy.network import PackedNetwork, pack

__all__ = ["PackedConv2d", "PackedNetwork", "load", "pack", "save"]
