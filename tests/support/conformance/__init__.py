"""The conformance table: every kind of adapter on every architecture, with PEFT as the oracle."""
