"""A pool or a model behind an OpenAI-compatible endpoint. One generation at a time; nothing is fetched and nothing is stored."""
