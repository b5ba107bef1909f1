"""Small checkpoints in the released format, their tokenizer, FP8 quantization."""
