"""What every role agrees on. Imports nothing of the other floors; only what handles weights and logits imports torch."""
