"""Small checkpoints in the released format, their tokenizer, FP8 quantization; `modeling_mimo.conversion` when installed."""
