"""Where models come from. Loaders only: nothing here knows about compression."""
