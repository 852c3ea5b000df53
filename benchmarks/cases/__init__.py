"""The timed cases: operators, tokenizers and training steps on random weights."""
