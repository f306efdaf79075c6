"""Layer 5: teachers: models that run beside the student, or logits that were stored beforehand.

`live` runs a teacher, `stored` writes and reads its logits, `objective` makes the loss that the training loop takes,
`vocabulary` sees to it that both speak of the same tokens.
"""
