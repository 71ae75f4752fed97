"""What a model can do, in numbers: held-out losses, loss by position, infilling."""
