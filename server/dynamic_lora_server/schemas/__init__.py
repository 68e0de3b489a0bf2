"""The JSON of the HTTP API, as pydantic models: one module for each resource."""
