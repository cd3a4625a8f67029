"""Images, captions, and the cache of a data set's tokens."""
