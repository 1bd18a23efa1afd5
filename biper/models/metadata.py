"""What a network must know of itself to be rebuilt, fed and read: saved with it, and never guessed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metadata:
    """The identity of a network and of the data that it was trained on.

    freq in radians per unit weight; mean and std per channel for images in [0, 1]; classes in the order of the
    logits, class_names the same in words.
    The fields of the data are empty on a network fresh from `create_model`.
    """

    model: str
    family: str
    num_classes: int
    freq: float
    stage: int
    dataset: str = ""
    classes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    image_size: int | None = None

    @property
    def shown_size(self) -> int:
        """The side of the images that it is shown; its family's if it has not been trained."""
        return self.image_size or (224 if self.family == "imagenet" else 32)
