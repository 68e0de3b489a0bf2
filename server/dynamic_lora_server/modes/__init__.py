"""The choice between bypass and merged: costs and policy. Imports no torch."""

from dynamic_lora_server.modes.costs import Mix, Points, StepCosts, rising
from dynamic_lora_server.modes.policy import Load, Mode, ModePolicy

__all__ = ["Load", "Mix", "Mode", "ModePolicy", "Points", "StepCosts", "rising"]
