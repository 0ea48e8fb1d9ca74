"""The built-in model and text, and the demo made of them."""
