"""The HTTP server: OpenAI's interface, as vLLM has it, in front of one engine, and a page to chat with it."""
