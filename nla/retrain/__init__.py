"""What happens to a compressed model until it is measured again: its triplets are trained on the model's own loss."""
