"""A model behind HTTP: OpenAI's requests in, answers out."""
