"""What the user asks for, section by section, and the tasks there are."""
