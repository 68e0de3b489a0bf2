"""Generation events in the shapes of the wires: TGI's, OpenAI's completions, chat and responses."""
