"""Data pipeline from object storage to rows: shards, manifests, packing, the plan, the ledger and rendering."""
