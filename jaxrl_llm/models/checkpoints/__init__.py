"""Weights and architectures of Hugging Face and GGUF files, in and out."""
