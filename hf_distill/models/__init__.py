"""What is read from transformers models: their type, layers, features, logits and forward passes."""
