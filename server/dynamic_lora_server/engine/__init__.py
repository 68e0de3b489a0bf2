"""The step loop: schedule, build the batch, run the model, sample, emit."""
