"""What can go wrong in a training run, one tree.

TrainingError
├── TrainingConfigError    the recipe, or an option, asks for what cannot be done
├── DatasetError           a data file cannot be used
└── TrainingInterrupted    somebody ended the run
"""


class TrainingError(Exception):
    """Base of every error that `dynamic_lora_server.training` raises."""


class TrainingConfigError(TrainingError):
    """The recipe is unreadable, or a field of it is missing, unknown or out of range."""


class DatasetError(TrainingError):
    """A data file is missing, malformed or empty; the message names file and line."""


class TrainingInterrupted(TrainingError):
    """Somebody ended the run; the message says where what was trained until then lies."""
