"""Fine-tuning of a smaller model, by labels and by the model that it was made from."""
