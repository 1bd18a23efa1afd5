"""The ways in which a command ends early, other than by the user's hand."""


class UsageError(ValueError):
    """Something that the user can mend. The commands print it as one line and exit with code 2."""


class TrainingDiverged(RuntimeError):
    """The loss or a weight is no longer finite. The commands print it as one line and exit with code 1."""


class Different(RuntimeError):
    """A packed network does not compute what the checkpoint does."""
