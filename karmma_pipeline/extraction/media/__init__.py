"""Opens media files and reads pictures and sound at given times."""
