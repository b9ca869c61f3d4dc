"""What lies on disk and how it is read: manifests, feature stores, the loader and its masks."""
