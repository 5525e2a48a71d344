"""Weight quantisation: what the schemes are and how a weight is rounded to them."""
