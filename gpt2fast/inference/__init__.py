"""What a trained model is used for: text, the loss of a split, HellaSwag."""
