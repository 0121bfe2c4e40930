"""From a registry's entry to token ids on disk, and from there to batches.

sources       an entry's rows: readers (JSON, CSV), columnar (parquet, Arrow), cloud_files, hub_datasets
detect        what unknown columns mean; unsupported: what is not for fine-tuning on text
formats       a row as a conversation; messages: a turn of it
render        a conversation as ids and labels: templating (text), special_tokens (what stays text), encode (ids)
tokenization  all rows of a dataset, by workers (process_pool), as Arrow files; outcome: what became of them
build_cache   finds or makes these; cache_key: the name of their folder; token_cache: opens them
sampling      which rows train and which are held out; minhash: which are alike; stream: rows that are never cached
batches       the micro-batches of a rank; packing: which rows train together
"""
