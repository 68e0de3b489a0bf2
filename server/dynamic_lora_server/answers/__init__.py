"""Generation events in the shapes of the wires: TGI's, OpenAI's completions and chat."""
