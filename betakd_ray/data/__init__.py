"""Object storage → rows → batches: shards and their manifests, packing, rendering, collating."""
