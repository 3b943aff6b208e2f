"""streamllm: language models that talk for ever in constant memory."""
