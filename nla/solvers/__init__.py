"""How triplets are found: in closed form, or by gradient descent."""
