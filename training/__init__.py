"""Fine-tuning of MiMo-V2: data collator, stage presets, LoRA targets, router bias update, distillation."""
