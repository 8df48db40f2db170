"""Images: conditioning images are opened, resized and converted; results are encoded and shown."""
