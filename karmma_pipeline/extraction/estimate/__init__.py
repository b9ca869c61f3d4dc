"""What an extraction will meet and cost, before it starts."""
