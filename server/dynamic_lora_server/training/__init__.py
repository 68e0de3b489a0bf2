"""Training a task's LoRA adapter from a recipe: `dynamic-lora train CONFIG`."""

from dynamic_lora_server.training.config import TrainingConfig, load_config
from dynamic_lora_server.training.errors import (
    DatasetError,
    TrainingConfigError,
    TrainingError,
    TrainingInterrupted,
)
from dynamic_lora_server.training.run import TrainingSummary, run_training
from dynamic_lora_server.training.trainer import Progress

__all__ = [
    "DatasetError",
    "Progress",
    "TrainingConfig",
    "TrainingConfigError",
    "TrainingError",
    "TrainingInterrupted",
    "TrainingSummary",
    "load_config",
    "run_training",
]
