"""Pure tests: no torch, no Ray, no model is loaded."""
