"""How many images per second a node serves, by what each step costs: `python -m benchmarks.sizing -h`."""
