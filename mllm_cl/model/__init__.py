"""Surgery on Hugging Face models; imports `drift`, `engine` and transformers."""
