"""What every role agrees on. Imports nothing of the other floors; only `policy_store`, `logprobs` and `model` import torch."""
