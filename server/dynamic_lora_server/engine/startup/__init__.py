"""What happens once, before the first step: memory is planned, speeds are measured."""
