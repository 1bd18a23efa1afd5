"""The networks. Importing the package fills the registry."""

from biper.models import cifar_resnet, imagenet_resnet, mobilenet, vgg
from biper.models.registry import Network, create_model, list_models

__all__ = ["Network", "cifar_resnet", "create_model", "imagenet_resnet", "list_models", "mobilenet", "vgg"]
