"""What `tiny-long` is made of: its tokens, its rows, the stages of its training, its scores."""
