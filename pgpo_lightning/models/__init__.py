"""Language models: loading, layout of sequences, LoRA, quantization, and checks of what a model computes."""
