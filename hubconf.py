"""Entry points of torch.hub, one for every model: torch.hub.load(REPOSITORY, "resnet20_1w1a", pretrained=True)."""

import sys
from functools import partial, update_wrapper
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # as torch.hub does, whoever imports this

from biper.models import create_model, list_models

dependencies = ["torch", "torchvision", "numpy", "PIL", "yaml", "safetensors", "tqdm"]

for _name in list_models():
    globals()[_name] = update_wrapper(partial(create_model, _name), create_model)
