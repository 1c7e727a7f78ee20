"""The kinds of checkpoint: Hugging Face folder, Ollama store, GGUF file."""
