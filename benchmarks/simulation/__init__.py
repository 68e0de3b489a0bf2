"""The choice between bypass and merged, simulated over traces. Imports no torch."""
