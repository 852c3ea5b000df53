"""What the fault scenarios send, and how they judge what came back."""
