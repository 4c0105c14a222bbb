"""A model's forward under a plan, as `ebcache_fast.enable` puts it in place."""
