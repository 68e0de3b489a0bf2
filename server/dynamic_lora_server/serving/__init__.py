"""Generations between the HTTP layer and the engine."""
