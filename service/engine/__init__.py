"""The engine: items in, batches through the devices, results out. It knows nothing of HTTP."""
