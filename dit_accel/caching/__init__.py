"""Feature caches, one file each: what is kept from earlier steps, and when it is used again."""
