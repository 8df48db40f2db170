"""Pixels: conditioning images opened, fitted and made; images written and shown."""
