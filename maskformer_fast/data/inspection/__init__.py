"""What lies in a folder of images and labels: its format, its numbers, and what is suspicious in it."""
