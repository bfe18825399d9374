"""Use a trained model: generate text, compute the loss of a split, score HellaSwag."""
