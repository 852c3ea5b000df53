"""What goes over the wire: what callers give, requests, answers, results."""
