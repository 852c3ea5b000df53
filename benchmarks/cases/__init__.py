"""What is timed: operators, tokenizers and training steps on random weights."""
