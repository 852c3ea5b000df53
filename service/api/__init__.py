"""The routes, and what each of them does with a request."""
