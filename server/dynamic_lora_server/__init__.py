"""The Dynamic LoRA server: requests, scheduling, the model and the HTTP API."""
