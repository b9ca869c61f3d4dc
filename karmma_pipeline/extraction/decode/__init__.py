"""From clips to network inputs, in processes of their own."""
