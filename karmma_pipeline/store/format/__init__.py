"""How a store lies on disk: names, shards, records, columns."""
