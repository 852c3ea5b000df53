"""The routes, and the steps that they take with a request."""
