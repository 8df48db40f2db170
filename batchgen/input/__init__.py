"""The input dataset: rows in spans, and conditioning images at URIs."""
